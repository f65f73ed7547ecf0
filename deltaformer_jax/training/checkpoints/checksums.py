"""sha256.json: the checksums that tell whether a checkpoint is whole. Importing this module does not import jax."""

import hashlib
import json

from etils import epath

CHECKSUMS = "sha256.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or incomplete, or does not fit the run."""


def write_checksums(folder: epath.Path) -> None:
    """Write sha256.json: the SHA-256 of every file of a finished checkpoint."""
    files = {name: _sha256(folder / name) for name in _files(folder)}
    draft = folder / f"{CHECKSUMS}.tmp"
    draft.write_text(json.dumps(files, indent=1))
    draft.replace(folder / CHECKSUMS)


def check_checksums(folder: epath.Path) -> None:
    """Raise CheckpointError, naming the file, unless every file is present and has the SHA-256 that was recorded."""
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
    for name, digest in expected.items():
        if name not in found:
            raise CheckpointError(f"{folder / name}: missing from the checkpoint")
        if _sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: corrupt (its SHA-256 is not the one it was written with)")


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
