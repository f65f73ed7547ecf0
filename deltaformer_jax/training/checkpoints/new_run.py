"""The folder of a run that begins with given parameters: one checkpoint, of step 0, with a new optimiser."""

from __future__ import annotations

from typing import Any

from etils import epath

from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data.tokenizer import Tokenizer
from deltaformer_jax.model_parts import model_parts
from deltaformer_jax.training.checkpoints.restore import TOKENIZER_FILE
from deltaformer_jax.training.checkpoints.store import Checkpoints
from deltaformer_jax.training.optimiser import make_optimiser
from deltaformer_jax.training.position import Position
from deltaformer_jax.training.state import new_state


def check_new(flag: str, folder: epath.Path) -> None:
    """Raise FileExistsError, naming `flag`, unless `folder` is new or empty."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{flag} {folder}: is a file; give a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{flag} {folder}: is not empty; give a new folder")


def write_run(folder: epath.Path, saved: Saved, params: Any, tokenizer: Tokenizer, files: dict[str, str]) -> None:
    """Write the run's config, tokenizer, checkpoint and `files`, texts by name; `train`, `sample`, `evaluate` read it.

    params: as `model_parts.ModelParts.params` of saved.config.model, which has its vocabulary's size.
    """
    parts = model_parts(saved.config.model)
    optimiser = make_optimiser(saved.config.optimizer, parts.decay, parts.axes)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {TOKENIZER_FILE: tokenizer.file_text, **files}.items():
        (folder / name).write_text(text)
    saved.write(folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    state = new_state(parts, params, optimiser, skip=saved.config.optimizer.skip)
    checkpoints.save(state, {**Position().as_record(), **saved.as_json()})
    checkpoints.wait()
    checkpoints.close()
