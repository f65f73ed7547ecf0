"""Folders laid out as datasets on the Hugging Face hub: one subset and one split of them is read.

    data/train-00000-of-00003.parquet, train-00000-of-00003.parquet    the subset "default"
    SUBSET/train-00000-of-00003.parquet, data/SUBSET/train-...         a subset
    SUBSET/train/0000.parquet                                          as the hub converts datasets

The shards may also be JSON lines. A hash may follow their number.
"""

from __future__ import annotations

import re
from pathlib import Path

_DATA = re.compile(r".+\.(?:parquet|jsonl|jsonl\.gz|jsonl\.zst|json\.gz|json\.zst)", re.IGNORECASE)
_SHARD = re.compile(r"(?:(?P<subset>.+)/)?(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.[a-z.]+")
_CONVERTED = re.compile(r"(?P<subset>[^/]+)/(?P<split>\w+(?:\.\w+)*)/\d{4}\.parquet")
DEFAULT = "default"


def chosen_shards(root: Path, names: list[str], subset: str, split: str) -> tuple[list[str], dict[str, str]]:
    """(the names that belong to the subset and split, {"subset": ..., "split": ...}).

    A folder whose data files are not all named as shards is no such dataset: all its names and {} are returned, or, if
    a subset or split is asked for, ValueError is raised. So it is for one that is not there, and for "" if there are
    several: the message lists them.
    """
    found: dict[str, dict[str, list[str]]] = {}
    others = []
    for name in filter(_DATA.fullmatch, names):
        if match := _SHARD.fullmatch(name) or _CONVERTED.fullmatch(name):
            of = re.sub(r"^data(/|$)", "", match["subset"] or "") or DEFAULT
            found.setdefault(of, {}).setdefault(match["split"], []).append(name)
        else:
            others.append(name)
    if not found or (others and not (subset or split)):
        if subset or split:
            raise ValueError(
                f"{root}: --subset and --split are for folders of shards such as data/train-00000-of-00003.parquet or "
                "SUBSET/train-00000-of-00003.parquet, and there are none; name the files or a folder of them"
            )
        return names, {}
    subset = _one(root, "subset", subset, list(found))
    split = _one(root, "split", split, list(found[subset]))
    return found[subset][split], {"subset": subset, "split": split}


def _one(root: Path, what: str, asked: str, there: list[str]) -> str:
    if asked in there:
        return asked
    listed = ", ".join(sorted(there))
    if asked:
        raise ValueError(f"{root}: has no {what} {asked!r}; --{what} is one of: {listed}")
    if len(there) > 1:
        raise ValueError(f"{root}: has {len(there)} {what}s; choose one with --{what}: {listed}")
    return there[0]
