"""Importing objects that a config names as "package.module:NAME": a user's own mixers and similarities."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Modules whose classes another process cannot import: the program itself, and the config file.
NOT_IMPORTABLE = ("__main__", "config_config")


def is_import(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"\w+(\.\w+)*:[^\W\d]\w*(\.[^\W\d]\w*)*", text) is not None


def import_object(text: str, field: str) -> Any:
    """Import "package.module:NAME" from Python's path. Raises ValueError, naming `field`, if it does not exist."""
    module, _, name = text.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but a module that it imports does not
        raise ValueError(
            f"{field}: {text!r}: there is no module {error.name!r} on Python's path; install it, or set PYTHONPATH"
        ) from None
    except AttributeError:
        raise ValueError(f"{field}: {text!r}: the module {module!r} has no {name!r}") from None
    return found


def refuse_inside(text: str, folder: Path, field: str) -> None:
    """Raise ValueError if any part of the module of "package.module:NAME" would be imported from a run's `folder`.

    Reading a folder of data must not run code that lies in it. This check imports nothing.
    """
    top, *parts = text.partition(":")[0].split(".")
    found = importlib.util.find_spec(top)
    if found is None:
        return  # import_object will raise the error
    places = [Path(found.origin)] if found.origin else []
    for root in found.submodule_search_locations or ():
        places += [Path(root), *(Path(root, *parts[: end + 1]) for end in range(len(parts)))]
    for place in places:
        if place.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{field}: {text!r} lies in the run's folder, {place}; modules are not imported from there: move the "
                "module elsewhere on Python's path, or start the program in another folder"
            )


def hashes(texts: Iterable[str]) -> dict[str, str]:
    """{"hash of the module NAME": SHA-256} of the file of each module in texts "package.module:NAME".

    With it the processes of a run compare the user's own code: only these files, not what they import in turn.
    """
    modules = {text.partition(":")[0] for text in texts} - {*NOT_IMPORTABLE}
    return {f"hash of the module {name}": _hash(name) for name in sorted(modules)}


def _hash(module: str) -> str:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.origin or not Path(found.origin).is_file():
        return "none: it has no file"
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:12]
