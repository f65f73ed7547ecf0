"""Objects that a config names as "package.module:NAME": mixers and similarities of the user's own."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

# Modules whose classes no other process could import.
NOT_IMPORTABLE = ("__main__", "config_config")


def is_import(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", text) is not None


def import_object(text: str, field: str) -> Any:
    """The object NAME of "package.module:NAME", found on Python's path. Raises ValueError naming the config's field."""
    module, _, name = text.partition(":")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there and asks for another that is not
        raise ValueError(
            f"{field}: {text!r}: there is no module {error.name!r} on Python's path; install it, or set PYTHONPATH"
        ) from None
    except AttributeError:
        raise ValueError(f"{field}: {text!r}: the module {module!r} has no {name!r}") from None
    return found


def refuse_inside(text: str, folder: Path, field: str) -> None:
    """Raise ValueError if any part of the module of "package.module:NAME" would be imported from `folder`, a run's: a
    folder of data is to run no code. Nothing is imported."""
    top, *parts = text.partition(":")[0].split(".")
    found = importlib.util.find_spec(top)
    if found is None:
        return  # import_object says so
    places = [Path(found.origin)] if found.origin else []
    for root in found.submodule_search_locations or ():
        places += [Path(root), *(Path(root, *parts[: end + 1]) for end in range(len(parts)))]
    for place in places:
        if place.resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{field}: {text!r} lies in the run's folder, {place}; modules are imported from Python's path only: "
                "move it, or start the program in another folder"
            )
