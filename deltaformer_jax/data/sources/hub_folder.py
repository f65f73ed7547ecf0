"""Folders laid out as datasets on the Hugging Face hub: one subset and one split of them is read.

    data/train-00000-of-00003.parquet, train-00000-of-00003.parquet    the subset "default"
    SUBSET/train-00000-of-00003.parquet, data/SUBSET/train-...         a subset
    SUBSET/train/0000.parquet                                          as the hub converts datasets
    c4-train.00000-of-01024.json.gz, train.jsonl, train/x.jsonl        a split by a usual name, if there are several
    c4-af.tfrecord-00000-of-00002.json.gz                              "train", if the same with -validation is there
    data/CC-MAIN-2024-10/000_00000.parquet, sample/10BT/000.parquet    a subset, without splits

The shards may also be JSON lines. A hash may follow their number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_DATA = re.compile(r".+\.(?:parquet|jsonl|jsonl\.gz|jsonl\.zst|json\.gz|json\.zst)", re.IGNORECASE)
_SHARD = re.compile(r"(?:(?P<subset>.+)/)?(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.[a-z.]+")
_CONVERTED = re.compile(r"(?P<subset>[^/]+)/(?P<split>\w+(?:\.\w+)*)/\d{4}\.parquet")
# Descriptions of the data beside or below them.
_CARD = re.compile(
    r"(?:(?P<folder>.*)/)?(?:readme|licen[cs]e|notice|citation|dataset[-_]?card|changelog|contributing)[^/]*", re.I
)
DEFAULT = "default"
WHOLE = "."  # the subset that is the folder itself
_LISTED = 20  # names in a message
# The usual names of splits, those for training and those that are held out, in order of preference.
TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing")
_USUAL = f"(?P<split>{'|'.join((*TRAINING, *HELD_OUT))})"
# A folder of that name, or that word in the file's name.
_IN_FOLDER = re.compile(rf"(?:(?P<subset>.+?)/)?{_USUAL}/.+")
_IN_NAME = re.compile(rf"(?:(?P<subset>.+)/)?(?:[^/]*[-_.])?{_USUAL}(?:[-_.][^/]*)?\.[a-z.]+")


class Chosen(NamedTuple):
    """names: the files to read. part: {"subset": ..., "split": ...}, {"subset": ...} of one without splits, or {} of a
    folder of another kind. others: the further splits. together: the subsets without splits that are read as one."""

    names: list[str]
    part: dict[str, str]
    others: list[str]
    together: list[str] = []


def chosen_shards(root: Path, names: list[str], subset: str, split: str, usual: Iterable[str] = TRAINING) -> Chosen:
    """The names that belong to the subset and split. "": the only subset; the only split, or else the first of `usual`.

    A subset may be named by a folder above it; "." are all. Data files that are not named as shards or splits have no
    split; their folders are the subsets. With "", a folder of several such subsets is refused if it has a README, for
    datasets have samples of themselves as subsets; without one it is read whole, and `together` lists them.
    README, LICENSE and the like are not read if there are data files beside or below them.

    Raises ValueError for a subset or split that is not there, for "" if there are several subsets, or several splits
    without a usual one, and for a folder of several splits and files of other names: the message lists them.
    """
    data = [name for name in names if _DATA.fullmatch(name)]
    cards = {name for name in names if (match := _CARD.fullmatch(name)) and _is_above(match["folder"] or "", data)}
    names = [name for name in names if name not in cards or name in data]
    found: dict[str, dict[str, list[str]]] = {}
    others, by_word = [], False
    for name in data:
        match = _SHARD.fullmatch(name) or _CONVERTED.fullmatch(name)
        if match is None and (match := _IN_FOLDER.fullmatch(name) or _IN_NAME.fullmatch(name)):
            by_word = True
        if match:
            of = re.sub(r"^data(/|$)", "", match["subset"] or "") or DEFAULT
            found.setdefault(of, {}).setdefault(match["split"], []).append(name)
        else:
            others.append(name)
    _pair(found, others)
    splits = {split for parts in found.values() for split in parts}
    asked = subset or split
    folders: dict[str, list[str]] = {}
    for name in others:
        folders.setdefault(_subset(name.rpartition("/")[0]), []).append(name)
    # One word in names may be chance.
    if not asked and (not found or (by_word and len(splits) == 1) or (others and len(splits) == 1)):
        together = sorted(folders) if len(names) == len(others) and len(folders) > 1 else []
        if together and any("/" not in name and name.lower().startswith("readme") for name in cards):
            raise ValueError(
                f"{root}: has {len(together)} subsets; choose one with --subset ({WHOLE} reads all), or name its "
                f"folder: {listed(together)}"
            )
        return Chosen(names, {}, [], together)
    if subset == WHOLE and not split:
        return Chosen(names, {"subset": WHOLE}, [])
    if subset and not split and not _below(subset, found) and (parts := _below(subset, folders)):
        return Chosen(sorted(name for part in parts for name in folders[part]), {"subset": subset}, [])
    if not found and subset and not split and len(folders) > 1:
        _one(root, "subset", subset, list(folders))
    if not found:
        raise ValueError(
            f"{root}: --subset and --split are for folders of shards such as data/train-00000-of-00003.parquet or "
            "SUBSET/train-00000-of-00003.parquet, and there are none; name the files or a folder of them"
        )
    if others and not asked:
        raise ValueError(
            f"{root}: holds the splits {', '.join(sorted(splits))} and files of other names, such as {others[0]}; "
            "choose a split with --split, or name a folder of the files to read"
        )
    if subset and subset not in found and (parts := _below(subset, found)):
        there: dict[str, list[str]] = {}
        for part in parts:
            for one, shards in found[part].items():
                there.setdefault(one, []).extend(shards)
    else:
        subset = _one(root, "subset", subset, sorted({*found, *folders} if subset else found))
        there = found[subset]
    first = next((name for name in usual if name in there), "") if len(there) > 1 else ""
    split = _one(root, "split", split or first, list(there))
    return Chosen(there[split], {"subset": subset, "split": split}, sorted(set(there) - {split}))


def _subset(folder: str) -> str:
    return re.sub(r"^data(/|$)", "", folder) or DEFAULT


def _is_above(folder: str, data: Iterable[str]) -> bool:
    return any(name.startswith(f"{folder}/") or not folder for name in data)


def _below(subset: str, there: Iterable[str]) -> list[str]:
    """The subset itself, and those in the folder of that name."""
    subset = _subset(subset.strip("/"))
    return sorted(one for one in there if one == subset or one.startswith(f"{subset}/"))


def _pair(found: dict[str, dict[str, list[str]]], others: list[str]) -> None:
    """Moves to the split "train" what differs from files of a held-out split in lacking that split's word alone."""
    bare = lambda name: re.sub(r"-\d{5}-of-\d{5}.*$", "", name)
    without = {
        bare(re.sub(rf"[-_.]{split}(?=[-_.][^/]*$)", "", name)): subset
        for subset, parts in found.items()
        for split, names in parts.items()
        if split in HELD_OUT
        for name in names
    }
    for name in [name for name in others if bare(name) in without]:
        others.remove(name)
        found[without[bare(name)]].setdefault(TRAINING[0], []).append(name)


def listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _one(root: Path, what: str, asked: str, there: list[str]) -> str:
    if asked in there:
        return asked
    known = listed(sorted(there))
    if asked:
        raise ValueError(f"{root}: has no {what} {asked!r}; --{what} is one of: {known}")
    if len(there) > 1:
        raise ValueError(f"{root}: has {len(there)} {what}s; choose one with --{what}: {known}")
    return there[0]
