"""The parts of a training step: which part a launch belongs to, and the least time that a device needs for each part.

mixers       the ops of the mixers: kernels, and what their forms in XLA and their backward passes do around them
products     products of linear layers inside the layers, and of gates
elementwise  all else inside the layers: norms, rotary embedding, activations, residuals, masks, casts of kernels
logits       the logits, the loss and their gradients, in pieces
optimiser    the gradient's norm, AdamW, the guard against bad batches
rest         embedding, final norm, layers sliced out of stacks and written into them, copies, sums over accumulation

JAX writes the functions that an instruction comes from into its op_name, for example
"jit(step)/jvp(jit(_hidden))/while/body/closed_call/jit(_attend)/...": `_hidden` is the model without its logits, the
while in it the scan over layers ("layer" if they are unrolled), `_attend` or `_run` the op of a mixer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from deltaformer_jax.compiled.launches import Launch

PARTS = ("mixers", "products", "elementwise", "logits", "optimiser", "rest")
RECOMPUTED = "rematted_computation"


def part_of(launch: Launch) -> str:
    name = launch.op_name
    # Before it may stand the loop over the parts of a batch.
    _, hidden, inside = name.partition("_hidden)")
    if hidden:
        layers = "/while/" in inside or "/layer/" in inside  # scanned or unrolled
        if re.search(r"\b(_attend|_run|_write)\b", inside) or (launch.kernel and layers):
            return "mixers"
        # The scan itself slices a layer out of a stack, or writes one into it.
        if not layers or re.search(r"/while/body/(jit\()?dynamic_", inside):
            return "rest"
        return "products" if launch.flops else "elementwise"
    if "jvp(" in name:
        return "logits"
    return "optimiser" if name.startswith("jit(step)/") and "/while/" not in name else "rest"


class Row(NamedTuple):
    """A part of the step on the device: what it launches, moves and computes, and the seconds it needs at least."""

    part: str
    launches: int
    bytes: int
    flops: float
    seconds: float


def roofline(launches: Iterable[Launch], kernel_flops: float, bandwidth: float, peak: float) -> list[Row]:
    """A row for each part: seconds = sum over its launches of turns · max(bytes / bandwidth, FLOPs / peak).

    Launches run one after another, so each has its own bound. The arithmetic of the mixers' kernels is not visible in
    the program: all their launches together are one case with `kernel_flops` FLOPs.
    """
    launches = list(launches)
    rows = []
    for part in PARTS:
        own = [x for x in launches if part_of(x) == part]
        kernels = part == "mixers" and any(x.kernel for x in own)
        seconds = sum(x.turns * max(x.bytes / bandwidth, x.flops / peak) for x in own if not (kernels and x.kernel))
        more = kernel_flops if kernels else 0.0
        if kernels:
            seconds += max(sum(x.turns * x.bytes for x in own if x.kernel) / bandwidth, more / peak)
        flops = sum(x.turns * x.flops for x in own) + more
        rows.append(Row(part, sum(x.turns for x in own), sum(x.turns * x.bytes for x in own), flops, seconds))
    return rows


def kernel_passes(launches: Iterable[Launch]) -> float:
    """How many forward passes of arithmetic the mixers' kernels make: 1, 2 for the backward pass, and recomputation.

    Recomputation counts by the bytes of the kernels that the backward pass runs again, relative to the forward pass.
    0 if the mixers have no kernels, for the products of a form in XLA are visible.
    """
    moved = {"forward": 0, RECOMPUTED: 0, "backward": 0}
    for x in launches:
        if x.kernel and part_of(x) == "mixers":
            kind = RECOMPUTED if RECOMPUTED in x.op_name else "backward" if "transpose(" in x.op_name else "forward"
            moved[kind] += x.turns * x.bytes
    return 3 + moved[RECOMPUTED] / moved["forward"] if moved["forward"] else 0.0


def measured(events: Iterable[tuple[str, float]], launches: Iterable[Launch]) -> dict[str, float]:
    """Time by part, and "not matched", of a device's events: (name, time), in the unit of the events' times.

    A name is that of an HLO instruction. As the name of a GPU kernel it has "_" in the place of ".".
    """
    parts = {}
    for launch in launches:
        for name in (launch.name, launch.name.replace(".", "_")):
            parts[name] = part_of(launch)
    total = dict.fromkeys((*PARTS, "not matched"), 0.0)
    for name, time in events:
        total[parts.get(name.removeprefix("%"), "not matched")] += time
    return total


def short(op_name: str) -> str:
    """An op_name without what says nothing here."""
    return re.sub(r"jit\(step\)/|closed_call/|eval_jaxpr/|while/body/|cond/|branch_\d+_fun/|checkpoint/", "", op_name)
