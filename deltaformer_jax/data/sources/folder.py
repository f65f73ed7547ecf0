"""Finds the files below a folder, each once even if links give it several names, and lists what is left out."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

_OTHER_NAME = "another name of what is read"


def files_below(root: Path, kind: Callable[[Path], str | None]) -> tuple[list[str], list[tuple[str, str]]]:
    """(names of the files of a known `kind`, [(name, why it is left out)]), relative to `root` with "/", both sorted.

    Hidden names and __pycache__ are ignored. Links are followed in sorted order, after everything that is found without
    links. A file or folder whose real path has been found already is left out. Only regular files are taken: reading a
    pipe could wait for ever, and a device may have no end.
    """
    found, left = {}, []
    folders, links = [("", os.path.realpath(root))], []
    seen = {folders[0][1]}
    while folders or links:
        if not folders:
            name, path = links.pop(0)
            try:
                real = os.path.realpath(path, strict=True)
                is_folder = stat.S_ISDIR(os.stat(real).st_mode)
            except OSError as error:
                left.append((name, _why_not(error)))
                continue
            if not is_folder:
                _take(name, real, kind, found, left)
                continue
            if real in seen:
                left.append((name, _OTHER_NAME))
                continue
            seen.add(real)
            folders.append((f"{name}/", real))
        prefix, folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            left.append((prefix or ".", _why_not(error)))
            continue
        for entry in entries:
            name, path = prefix + entry.name, os.path.join(folder, entry.name)
            if entry.name.startswith(".") or entry.name == "__pycache__":
                continue
            if entry.is_symlink():
                links.append((name, path))
            elif not entry.is_dir(follow_symlinks=False):
                _take(name, path, kind, found, left)
            elif path in seen:
                left.append((name, _OTHER_NAME))
            else:
                seen.add(path)
                folders.append((f"{name}/", path))
        links.sort()
    return sorted(found.values()), sorted(left)


def _take(
    name: str, real: str, kind: Callable[[Path], str | None], found: dict[str, str], left: list[tuple[str, str]]
) -> None:
    """Adds the file `name` to `found`, by its real path, or to `left`."""
    try:
        why = no_file(os.stat(real).st_mode) or (None if os.access(real, os.R_OK) else "Permission denied")
    except OSError as error:
        why = _why_not(error)
    if why is None and not kind(Path(name)):
        why = "of another kind"
    if why is None and real in found:
        why = _OTHER_NAME
    if why is None:
        found[real] = name
    else:
        left.append((name, why))


def no_file(mode: int) -> str | None:
    """The kind of file that `mode` (from stat) says, if it is neither a regular file nor a folder; else None."""
    kinds = {"a named pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK, "a device": stat.S_ISCHR}
    kinds |= {"a disk": stat.S_ISBLK}
    return next((name for name, is_kind in kinds.items() if is_kind(mode)), None)


def _why_not(error: OSError) -> str:
    why = {errno.ELOOP: "a loop of links", errno.ENOENT: "a link to nothing"}
    return why.get(error.errno) or error.strerror or "cannot be read"
