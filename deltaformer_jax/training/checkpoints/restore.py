"""Restoring the model of a finished or running run, for programs that only read it."""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from deltaformer_jax.config import Config, MeshConfig, on_any_device
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data import Tokenizer, load_tokenizer
from deltaformer_jax.data.chat import CHAT_FILE, ChatFormat
from deltaformer_jax.interop.kept import ends_of_run, prefix_of_run
from deltaformer_jax.layers.adapters import merged
from deltaformer_jax.model_parts import merge, params_of
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.checkpoints.checksums import CheckpointError, check_checksums
from deltaformer_jax.training.checkpoints.store import Checkpoints
from deltaformer_jax.training.checkpoints.vocabulary import with_vocabulary
from deltaformer_jax.training.program import Program

TOKENIZER_FILE = "tokenizer.json"


class Restored(NamedTuple):
    """`config` has its vocabulary size filled in. `params`, of the checkpoint `step`, are arrays on `program.mesh`.

    Adapters of the run are added to their kernels, and `program` is that of the model without them.
    """

    config: Config
    tokenizer: Tokenizer
    program: Program
    params: Any
    step: int


def restore(workdir: epath.PathLike, step: int | None = None, note: Callable[[str], Any] = lambda _: None) -> Restored:
    """The model of the newest whole checkpoint, or of `step`, for any device. Changes nothing in `workdir`.

    `note(text)` is called for each damaged checkpoint that is skipped. Raises FileNotFoundError or ValueError
    (CheckpointError), naming the folder or file, if the folder holds no run or a checkpoint is missing or corrupt.
    """
    workdir = epath.Path(workdir)
    saved = Saved.read(workdir)
    tokenizer = read_tokenizer(workdir, saved)
    tokenizer.prefix = prefix_of_run(workdir, tokenizer)
    tokenizer.ends |= set(ends_of_run(workdir))
    config = with_vocabulary(saved.config, tokenizer)
    config = dataclasses.replace(config, model=on_any_device(config.model))
    program = Program(config, make_mesh(MeshConfig()))  # not the run's mesh: this machine may have other devices
    folder = workdir / "checkpoints"
    if not folder.exists():
        raise CheckpointError(f"--workdir {workdir}: no checkpoint yet")
    checkpoints = Checkpoints(folder, config.run.keep_checkpoints)
    try:
        if step is None:
            state, record = checkpoints.restore_newest(program.abstract, note)
        else:
            if step not in checkpoints.steps():
                there = ", ".join(map(str, checkpoints.steps())) or "none"
                raise CheckpointError(f"--step {step}: no such checkpoint in {folder}; there are: {there}")
            check_checksums(checkpoints.path(step))
            state, record = checkpoints.restore(step, program.abstract)
    finally:
        checkpoints.close()
    params = state.params
    if config.optimizer.lora_rank:
        model = merged(merge(program.parts, params))
        optimizer = dataclasses.replace(config.optimizer, lora_rank=0)
        program = Program(dataclasses.replace(config, optimizer=optimizer), program.mesh)
        params = jax.device_put(params_of(model), program.shardings.params)
    return Restored(config, tokenizer, program, params, int(record["step"]))


def read_chat(workdir: epath.PathLike) -> ChatFormat | None:
    """The form of the run's conversations, those of its data or of the folder that it was converted from; or None.

    Raises ValueError, naming a damaged file.
    """
    path = epath.Path(workdir) / CHAT_FILE
    if not path.exists():
        return None
    try:
        return ChatFormat.of(json.loads(path.read_text()), str(path))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not the form of a conversation: {error}") from None


def read_tokenizer(workdir: epath.Path, saved: Saved) -> Tokenizer:
    """The run's own copy of its tokenizer.

    Raises FileNotFoundError if it is missing, ValueError if its hash is not the one in config.json.
    """
    path = workdir / TOKENIZER_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path}: missing; copy the {TOKENIZER_FILE} of the run's data there")
    with tempfile.TemporaryDirectory() as folder:  # the workdir may be gs://, which load_tokenizer can't read
        copy = Path(folder) / TOKENIZER_FILE
        copy.write_bytes(path.read_bytes())
        try:
            tokenizer = load_tokenizer(copy)
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), str(path))) from None
    if tokenizer.hash != saved.tokenizer_hash:
        raise ValueError(f"{path}: not the tokenizer this run was trained with; copy it from the run's data")
    return tokenizer
