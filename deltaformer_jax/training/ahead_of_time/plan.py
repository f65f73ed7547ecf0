"""What a config's training step needs on devices that are not at hand: it is compiled for them, and nothing runs."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import NamedTuple

import jax

from deltaformer_jax.compiled.collectives import collectives
from deltaformer_jax.compiled.launches import launches
from deltaformer_jax.config import Config
from deltaformer_jax.config.checks import check
from deltaformer_jax.host.waiting import say_aside, waiting
from deltaformer_jax.sharding.device_memory import planned_memory
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.ahead_of_time.buffers import (
    Buffer,
    dump_options,
    largest_buffers,
    program_text,
    total_bytes,
)
from deltaformer_jax.training.ahead_of_time.flops import Flops, model_flops
from deltaformer_jax.training.ahead_of_time.roofline import Roofline, Sent, sent
from deltaformer_jax.training.ahead_of_time.topologies import Topology, without_cache
from deltaformer_jax.training.dry_run import with_any_vocabulary
from deltaformer_jax.training.memory import ORDER, step_bytes
from deltaformer_jax.training.on_mesh.kept_whole import check_split
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.setup import check_batch

NAMED = 8  # buffers


class Plan(NamedTuple):
    """The compiled step. config: with its vocabulary size and its choice of model.remat.

    compiled: None if the compiler refused it, because it does not fit. needed, available: bytes of a device.
    """

    config: Config
    topology: Topology
    program: Program
    compiled: jax.stages.Compiled | None
    needed: int
    available: float
    largest: list[Buffer]
    sent: list[Sent]
    flops: Flops
    roofline: Roofline

    @property
    def fits(self) -> bool:
        return self.compiled is not None and self.needed <= self.available

    @property
    def tokens(self) -> int:
        return self.config.data.batch_size * self.config.data.sequence_length

    @property
    def model_tflop(self) -> float:
        """Of the whole step on all devices, without what is computed again."""
        return self.program.training_flops(self.config.data.sequence_length) * self.tokens / 1e12

    def utilisation(self, seconds: float) -> float:
        """The MFU of a step that takes that long."""
        return self.model_tflop * 1e12 / (seconds * self.topology.chips * self.topology.chip.flops)


def make_plan(config: Config, topology: Topology) -> Plan:
    """Compile the training step of `config` for all devices of `topology`.

    With model.remat = "auto", for the first choice in `memory.ORDER` that fits. Raises the same errors as
    `setup.prepare` for a config that it refuses. Cost: minutes of one processor; a step of 340 million parameters takes
    about two, whatever the number of devices.
    """
    check(config)
    slices = "process_index" if topology.of_cards else "slice_index"
    mesh = make_mesh(config.mesh, topology.devices, slice_attribute=slices)
    check_batch(config, mesh)
    full = with_any_vocabulary(config)
    choices = ORDER if full.model.remat == "auto" else (full.model.remat,)
    with planned_memory(topology.device_memory), without_cache():
        for remat in choices:
            chosen = dataclasses.replace(full, model=dataclasses.replace(full.model, remat=remat))
            program = Program(chosen, mesh)
            check_split(program.parts, mesh, chosen.mesh.strict, say_aside, zero1=chosen.mesh.zero1)
            plan = _compiled(chosen, topology, program)
            if plan.fits:
                break
    return plan


def _compiled(config: Config, topology: Topology, program: Program) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        with waiting("tracing the model", say_aside):
            program.lower_train_step(config.data)
        with waiting(f"compiling for {topology.title}, model.remat = {config.model.remat}", say_aside):
            try:
                compiled = program.compile_train_step(config.data, dump_options(folder))
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                compiled = None
        needed = total_bytes(folder) if compiled is None else step_bytes(compiled)
        text, largest = program_text(folder), largest_buffers(folder, NAMED)
    flops = model_flops(program.parts, config.data.sequence_length)
    rows = sent(collectives(text, program.mesh.size), program.mesh, topology)
    chip, devices = topology.chip, len(topology.devices)
    share = topology.devices_per_chip
    length = config.data.sequence_length
    per_token = program.training_flops(length) + flops.recomputed(config.model.remat)
    tokens = config.data.batch_size * config.data.sequence_length
    moved = sum(x.turns * x.bytes for x in launches(text)[0])
    roofline = Roofline(
        arithmetic=per_token * tokens / devices / (chip.flops / share),
        memory=moved / (chip.bandwidth / share),
        communication=sum(row.seconds for row in rows),
    )
    return Plan(config, topology, program, compiled, needed, topology.device_memory, largest, rows, flops, roofline)
