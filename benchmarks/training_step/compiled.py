"""The training step of a config on one device, as both ways of benchmarks/train.py take it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from deltaformer_jax.config import Config
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.dry_run import with_any_vocabulary
from deltaformer_jax.training.memory import step_bytes
from deltaformer_jax.training.program import Program, abstract_batch
from deltaformer_jax.training.setup import check_batch

SMALLER = "give a smaller --batch, or raise --config.optimizer.accumulation_steps"


class Step(NamedTuple):
    config: Config  # with its vocabulary size
    program: Program
    device: jax.Device
    compiled: jax.stages.Compiled
    memory: int  # bytes: state, batch and temporaries

    @property
    def tokens(self) -> int:
        return self.config.data.batch_size * self.config.data.sequence_length

    @property
    def title(self) -> str:
        data, parts = self.config.data, self.config.optimizer.accumulation_steps
        of_parts = "" if parts == 1 else f" in {parts} parts"
        return f"{data.batch_size} x {data.sequence_length} tokens{of_parts}, remat {self.config.model.remat}"


def compile_step(config: Config, device: jax.Device) -> Step:
    """The step compiled for `device`. Raises what training raises for a config that it refuses."""
    if config.model.remat == "auto":
        raise ValueError(
            "model.remat = 'auto': one step is compiled; give --remat none, operands, products, kernels or block"
        )
    mesh = make_mesh(config.mesh, [device])
    check_batch(config, mesh)
    config = with_any_vocabulary(config)
    program = Program(config, mesh)
    compiled = program.compile_train_step(config.data)
    return Step(config, program, device, compiled, step_bytes(compiled))


def random_batch(step: Step) -> dict[str, jax.Array]:
    """Random tokens, one document a row, on the step's device."""
    draw = np.random.default_rng(0).integers
    batch = {}
    for name, like in abstract_batch(step.config.data, step.program.mesh).items():
        random = name in ("tokens", "targets")
        numbers = draw(step.config.model.vocab_size, size=like.shape) if random else np.ones(like.shape)
        batch[name] = jax.device_put(numbers.astype(like.dtype), like.sharding)
    return batch
