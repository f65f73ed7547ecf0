"""Where config files are: those that come with the package, by name, and the user's own, by path."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import deltaformer_jax

if TYPE_CHECKING:
    from deltaformer_jax.config import Config


def config_folder() -> Path:
    """The configs that come with the package: inside it in a wheel, beside it in a clone."""
    package = Path(deltaformer_jax.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def packaged_config(name: str) -> Config:
    """A new copy of the config `name` of those that come with the package, for another that differs from it in little.

    Raises FileNotFoundError where there is none of that name.
    """
    return runpy.run_path(find_config(name, config_folder()))["get_config"]()


def config_names() -> list[str]:
    """The names of the configs that come with the package, as --config takes them."""
    folder = config_folder()
    return [_short(path, folder) for path in sorted(folder.rglob("*.py"))]


def find_config(given: str, folder: Path) -> str:
    """The path of the config file `given`: a file, or the name of one in `folder`, with or without .py, as tasks/swap.

    What follows a ":" is the argument of its get_config and stays. Raises FileNotFoundError that names the nearest one.
    """
    name, colon, argument = given.partition(":")
    file = Path(name)
    if file.is_file():
        return given
    if not file.is_absolute() and (named := folder / file.parent / f"{file.stem}.py").is_file():
        return f"{named}{colon}{argument}"
    own = sorted(folder.rglob("*.py"))
    others = sorted({*file.parent.glob("*.py"), *own})
    near = difflib.get_close_matches(file.stem, [path.stem for path in others], n=1)
    if near:
        hint = f"did you mean {next(_short(path, folder) for path in others if path.stem == near[0])}?"
    else:
        hint = f"there are: {', '.join(_short(path, folder) for path in own)}"
    raise FileNotFoundError(f"--config {given}: no such file, and no config of that name; {hint}")


def _short(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix("")) if path.is_relative_to(folder) else str(path)
