"""Objects that a config names as "package.module:NAME": mixers and similarities of the user's own."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any


def is_import(text: Any) -> bool:
    return isinstance(text, str) and ":" in text


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
        if "<locals>" in name or module in ("__main__", "config_config"):
            raise ValueError(
                f"{field}: {text!r} was defined in a function, a notebook or a config file, where no import finds it; "
                "put it in a module on Python's path"
            ) from None
        raise ValueError(f"{field}: {text!r}: the module {module!r} has no {name!r}") from None
    return found


def refuse_inside(text: str, folder: Path, field: str) -> None:
    """Raise ValueError if the module of "package.module:NAME" would be imported from `folder`, a run's: a folder of
    data is to run no code."""
    top = text.partition(":")[0].partition(".")[0]
    found = importlib.util.find_spec(top)
    places = [] if found is None else [found.origin, *(found.submodule_search_locations or ())]
    for place in places:
        if place and Path(place).exists() and Path(place).resolve().is_relative_to(folder.resolve()):
            raise ValueError(
                f"{field}: {text!r} lies in the run's folder, {place}; modules are imported from Python's path only: "
                "move it, or start the program in another folder"
            )
