"""What run.init_from names, checked before jax is imported."""

import re

from etils import epath

from deltaformer_jax.config.saved import Saved

_FIX = "give the folder of a run, or one with config.json and safetensors"


def check_init_from(init_from: str) -> None:
    """Raise FileNotFoundError or NotADirectoryError, naming run.init_from and the fix, if it is no such folder."""
    folder = epath.Path(init_from)
    if not folder.exists():
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", init_from)
        download = f"; the hub's {init_from} is not downloaded here: hf download {init_from} --local-dir FOLDER"
        raise FileNotFoundError(f"run.init_from = {init_from!r}: no such folder; {_FIX}{download if hub else ''}")
    if not folder.is_dir():
        raise NotADirectoryError(f"run.init_from = {init_from!r}: is a file; {_FIX}")
    if not (folder / Saved.FILE).exists():
        raise FileNotFoundError(f"run.init_from = {init_from!r}: the folder has no {Saved.FILE}; {_FIX}")
