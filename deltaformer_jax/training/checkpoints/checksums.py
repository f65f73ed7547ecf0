"""sha256.json: the checksums that tell whether a checkpoint is whole. Importing this module does not import jax."""

import hashlib
import itertools
import json
import re

from etils import epath

from deltaformer_jax.host import processes
from deltaformer_jax.processes import common

CHECKSUMS = "sha256.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or incomplete, or does not fit the run."""


def write_checksums(folder: epath.Path) -> None:
    """Write sha256.json: the SHA-256 of every file of a finished checkpoint.

    All processes of a run call this. Each reads what it wrote (`_share`), and the first one writes.
    """
    names = common.first("files to hash", lambda: _files(folder))
    mine = _share(names, processes.index(), processes.count())
    parts = common.gather("hashes", {name: _sha256(folder / name) for name in mine})
    if processes.index() > 0:
        return
    digests = {name: digest for part in parts for name, digest in part.items()}
    draft = folder / f"{CHECKSUMS}.tmp"
    draft.write_text(json.dumps({name: digests[name] for name in names}, indent=1))
    draft.replace(folder / CHECKSUMS)


def check_checksums_together(folder: epath.Path) -> None:
    """As check_checksums, for all processes of a run: each reads its share of the files, and all raise if one does."""
    problem = None
    try:
        check_checksums(folder, (processes.index(), processes.count()))
    except CheckpointError as error:
        problem = str(error)
    found = [problem for problem in common.gather("damage", problem) if problem]
    if found:
        raise CheckpointError(found[0])


def check_checksums(folder: epath.Path, share: tuple[int, int] = (0, 1)) -> None:
    """Raise CheckpointError, naming the file, unless every file is present and has the SHA-256 that was recorded.

    share: (i, n), to compute the SHA-256 only of the files of process i of n (`_share`).
    """
    path = folder / CHECKSUMS
    if not path.exists():
        raise CheckpointError(f"{folder}: not a whole checkpoint ({CHECKSUMS} is missing: the save was cut short)")
    try:
        expected = dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        raise CheckpointError(f"{path}: corrupt (not a list of checksums)") from None
    found = set(_files(folder))
    if unlisted := sorted(found - expected.keys()):
        raise CheckpointError(f"{path}: does not list {unlisted[0]}, which is in the checkpoint")
    for name in expected:
        if name not in found:
            raise CheckpointError(f"{folder / name}: missing from the checkpoint")
    for name in _share(list(expected), *share):
        if _sha256(folder / name) != expected[name]:
            raise CheckpointError(f"{folder / name}: corrupt (its SHA-256 is not the one it was written with)")


def _share(names: list[str], index: int, count: int) -> list[str]:
    """The files whose SHA-256 process `index` of `count` computes: all processes together take each file once.

    Orbax names the folders of arrays by the process that wrote them. Such a folder is read by that process, or by
    process number modulo `count` if fewer go on. The few other files are dealt out in turn.
    """
    owners = [re.search(r"(?:^|/)ocdbt\.process_(\d+)/", name) for name in names]
    turns = itertools.count()
    return [
        name for name, owner in zip(names, owners) if (int(owner.group(1)) if owner else next(turns)) % count == index
    ]


def _files(folder: epath.Path) -> list[str]:
    found, folders = [], [folder]
    while folders:
        for path in folders.pop().iterdir():
            if path.is_dir():
                folders.append(path)
            elif not path.name.startswith(CHECKSUMS):
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
