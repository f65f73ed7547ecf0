"""Finding config files: those of the package by name, the user's own by path."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING

import deltaformer_jax
from deltaformer_jax.host.spelling import nearest

if TYPE_CHECKING:
    from deltaformer_jax.config import Config


def config_folder() -> Path:
    """The folder of the package's configs: inside the package in a wheel, beside it in a clone of the repository."""
    package = Path(deltaformer_jax.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def packaged_config(name: str) -> Config:
    """A new copy of the package's config `name`, for a config file that changes some of its fields.

    Raises FileNotFoundError if the package has no config of that name.
    """
    return runpy.run_path(find_config(name, config_folder()))["get_config"]()


def config_names() -> list[str]:
    """The names of the package's configs, as --config takes them."""
    folder = config_folder()
    return [_short(path, folder) for path in sorted(folder.rglob("*.py"))]


def find_config(given: str, folder: Path) -> str:
    """The path of the config file `given`, which is a path or a name in `folder`, such as tasks/swap or tiny.py.

    Text after a ":" is the argument of its get_config and is kept. Raises FileNotFoundError that names the nearest
    config, and ValueError for a file whose own path has a ":".
    """
    name, colon, argument = given.partition(":")
    if colon and Path(given).is_file():
        raise ValueError(f"--config {given}: a ':' in a path starts get_config's argument; rename the file or folder")
    file = Path(name)
    if file.is_file():
        return given
    if not file.is_absolute() and (named := folder / file.parent / f"{file.stem}.py").is_file():
        return f"{named}{colon}{argument}"
    own = sorted(folder.rglob("*.py"))
    others = sorted({*file.parent.glob("*.py"), *own})
    if near := nearest(file.stem, [path.stem for path in others]):
        hint = f"did you mean {next(_short(path, folder) for path in others if path.stem == near)}?"
    else:
        hint = f"there are: {', '.join(_short(path, folder) for path in own)}"
    raise FileNotFoundError(f"--config {given}: no such file, and no config of that name; {hint}")


def _short(path: Path, folder: Path) -> str:
    return str(path.relative_to(folder).with_suffix("")) if path.is_relative_to(folder) else str(path)
