"""The memory of a training step, and model.remat = "auto": the least recomputation with which the step fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from deltaformer_jax.config import Config
from deltaformer_jax.host.waiting import waiting
from deltaformer_jax.processes import common
from deltaformer_jax.sharding.device_memory import machine_bytes, memory_limit
from deltaformer_jax.training.program import Program

# From the least recomputation, and the most memory, to the most recomputation.
ORDER = ("none", "operands", "products", "kernels", "block")
# The share of a device's memory that a step may need. The allocator cannot use the gaps between arrays.
USABLE = 0.95


def step_bytes(compiled: jax.stages.Compiled) -> int | None:
    """The bytes that a compiled step needs on each device, state included; None if the compiler does not say.

    The new state takes the place of the old one, which is donated.
    """
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    made = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + made


def size_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def device_bytes(mesh: Mesh) -> int:
    """`memory_limit`, or on CPUs a device's share of the machine's memory."""
    return memory_limit(mesh) or machine_bytes() // max(1, len(mesh.local_devices))


def fitting_program(
    config: Config, mesh: Mesh, note: Callable[[str], Any], make_program: Callable[[Config, Mesh], Program] = Program
) -> Program:
    """make_program(config, mesh), its training step traced; with model.remat = "auto", for the first choice in ORDER
    that fits.

    Compiles the training step for each choice up to that one. If none fits, the last is taken, and `note` is told so.
    A TPU's compiler refuses a program that does not fit; the last one's refusal is raised.
    """

    def traced(config: Config) -> Program:
        with waiting("tracing the model", note):
            program = make_program(config, mesh)
            program.lower_train_step(config.data)
        return program

    if config.model.remat != "auto":
        return traced(config)
    # Of several processes all must choose alike: by the least memory that one of them has.
    limit, needs = min(common.gather("bytes of a device", device_bytes(mesh))), []
    for name in ORDER:
        program = traced(dataclasses.replace(config, model=dataclasses.replace(config.model, remat=name)))
        try:
            with waiting(f"compiling with model.remat = {name}", note):
                need = step_bytes(program.compile_train_step(config.data))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or name == ORDER[-1]:
                raise
            needs.append(f"{name} does not fit")
            continue
        needs.append(f"{name} needs {'an unknown amount' if need is None else size_text(need)}")
        if need is not None and need <= USABLE * limit:
            break
    else:
        needs.append("none of them fits")
    note(f"model.remat = auto: {name}, of {size_text(limit)} of memory on a device ({'; '.join(needs)})")
    return program
