"""A changed model as the folder of a new run: one checkpoint, of step 0, with a new optimiser."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from deltaformer_jax.config import ModelConfig, ObjectiveConfig
from deltaformer_jax.config.checks import check
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data.chat import CHAT_FILE
from deltaformer_jax.interop.kept import KEPT_FILE
from deltaformer_jax.training.checkpoints.new_run import write_run
from deltaformer_jax.training.checkpoints.restore import Restored
from deltaformer_jax.training.checkpoints.vocabulary import with_vocabulary


def model_of(saved: Saved, run: Restored) -> ModelConfig:
    """The config of a restored run's model, with its vocabulary."""
    return with_vocabulary(saved.config, run.tokenizer).model


def write_changed(out: str, workdir: str, saved: Saved, run: Restored, model: ModelConfig, params: Any) -> None:
    """Write a run like that of `workdir` with another model. Its adapters are in the kernels now, and with another
    number of layers its objective is the usual one.

    Raises ValueError, before anything is written, if the config has settings that do not fit each other.
    """
    optimizer = dataclasses.replace(saved.config.optimizer, lora_rank=0)
    same_depth = model.num_layers == saved.config.model.num_layers
    objective = saved.config.objective if same_depth else ObjectiveConfig()
    config = dataclasses.replace(saved.config, model=model, optimizer=optimizer, objective=objective)
    check(config)
    beside = {name: epath.Path(workdir) / name for name in (CHAT_FILE, KEPT_FILE)}
    files = {name: path.read_text() for name, path in beside.items() if path.exists()}
    changed = Saved(config, saved.tokenizer_hash, saved.corpus_hash)
    write_run(epath.Path(out), changed, params, run.tokenizer, files)
