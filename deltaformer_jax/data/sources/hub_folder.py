"""Folders laid out as datasets on the Hugging Face hub: one subset and one split of them is read.

    data/train-00000-of-00003.parquet, train-00000-of-00003.parquet    the subset "default"
    SUBSET/train-00000-of-00003.parquet, data/SUBSET/train-...         a subset
    SUBSET/train/0000.parquet                                          as the hub converts datasets
    c4-train.00000-of-01024.json.gz, train.jsonl, train/x.jsonl        a split by a usual name, if there are several

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
DEFAULT = "default"
# The usual names of splits, those for training and those that are held out, in order of preference.
TRAINING = ("train", "training")
HELD_OUT = ("validation", "valid", "val", "dev", "eval", "evaluation", "test", "testing")
_USUAL = f"(?P<split>{'|'.join((*TRAINING, *HELD_OUT))})"
# A folder of that name, or that word in the file's name.
_IN_FOLDER = re.compile(rf"(?:(?P<subset>.+?)/)?{_USUAL}/.+")
_IN_NAME = re.compile(rf"(?:(?P<subset>.+)/)?(?:[^/]*[-_.])?{_USUAL}(?:[-_.][^/]*)?\.[a-z.]+")


class Chosen(NamedTuple):
    """names: the files to read. part: {"subset": ..., "split": ...}, or {} of a folder of another kind. others: the
    further splits."""

    names: list[str]
    part: dict[str, str]
    others: list[str]


def chosen_shards(root: Path, names: list[str], subset: str, split: str, usual: Iterable[str] = TRAINING) -> Chosen:
    """The names that belong to the subset and split. "": the only subset; the only split, or else the first of `usual`.

    A folder whose data files are not all named as shards or splits is no such dataset: all its names are returned, or,
    if a subset or split is asked for, ValueError is raised. So it is for one that is not there, for "" if there are
    several subsets, or several splits without a usual one, and for a folder of several splits and files of other names:
    the message lists them.
    """
    found: dict[str, dict[str, list[str]]] = {}
    others, by_word = [], False
    for name in filter(_DATA.fullmatch, names):
        match = _SHARD.fullmatch(name) or _CONVERTED.fullmatch(name)
        if match is None and (match := _IN_FOLDER.fullmatch(name) or _IN_NAME.fullmatch(name)):
            by_word = True
        if match:
            of = re.sub(r"^data(/|$)", "", match["subset"] or "") or DEFAULT
            found.setdefault(of, {}).setdefault(match["split"], []).append(name)
        else:
            others.append(name)
    splits = {split for parts in found.values() for split in parts}
    asked = subset or split
    # One word in names may be chance.
    if not asked and (not found or (by_word and len(splits) == 1) or (others and len(splits) == 1)):
        return Chosen(names, {}, [])
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
    subset = _one(root, "subset", subset, list(found))
    there = found[subset]
    first = next((name for name in usual if name in there), "") if len(there) > 1 else ""
    split = _one(root, "split", split or first, list(there))
    return Chosen(there[split], {"subset": subset, "split": split}, sorted(set(there) - {split}))


def _one(root: Path, what: str, asked: str, there: list[str]) -> str:
    if asked in there:
        return asked
    listed = ", ".join(sorted(there))
    if asked:
        raise ValueError(f"{root}: has no {what} {asked!r}; --{what} is one of: {listed}")
    if len(there) > 1:
        raise ValueError(f"{root}: has {len(there)} {what}s; choose one with --{what}: {listed}")
    return there[0]
