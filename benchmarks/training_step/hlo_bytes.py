"""What a compiled program moves and computes, counted from its optimised HLO text (`compiled.as_text()`).

    bytes of a launch = operands read + outputs written, each array once
    FLOPs of a launch = sum over its dots of 2 · output elements · contracted size
    total             = sum over launches of turns · (bytes or FLOPs)

A launch is an instruction that the device executes: a fusion, a custom call, a copy, but no bitcast, tuple or constant.
Its turns are the product of the trip counts of the loops around it. An array of which a launch only touches slices is
counted with these slices: a layer sliced out of a stack, a layer written into one in place, gathered rows, scattered
rows. An operand that is passed twice is read once.

The bytes are a lower bound of what a device moves: a kernel may read an array several times. They are an upper bound
for arrays that are still in a cache. What a custom call computes is not visible, except for cuBLAS's products.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from deltaformer_jax.compiled.hlo import (
    FUSIONS,
    Computation,
    Instruction,
    attribute,
    bytes_of,
    called_by,
    dimensions,
    op_name_of,
    parse,
    sizes_of,
    trip_count,
)

# Instructions that the device does not execute.
FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}


class Launch(NamedTuple):
    """One instruction that the device executes `turns` times. bytes and flops are those of one turn."""

    name: str
    op: str  # "fusion", "custom-call", ...
    op_name: str  # the stack of JAX functions and scopes that it comes from, or ""
    shape: str
    turns: int
    bytes: int
    flops: int
    kernel: bool  # a custom call whose arithmetic is not visible
    loop: str  # the innermost while around it, or ""


class Loop(NamedTuple):
    name: str
    op_name: str
    turns: int  # how often its body runs in the whole program
    known: bool  # whether the program says so; an unknown trip count counts as 1


def launches(text: str) -> tuple[list[Launch], list[Loop]]:
    """The launches and the loops of the HLO module `text`, in the order of the text.

    All branches of a conditional are counted. Raises ValueError if the text has no entry computation.
    """
    computations, entry = parse(text)
    found, loops = [], []

    def walk(name: str, turns: int, loop: str):
        computation = computations[name]
        for x in computation.instructions.values():
            if x.op in FREE or x.op.endswith(("-done", "-update")):
                continue
            inner = called_by(x)
            if x.op == "while":
                trips = trip_count(computations, x)
                inside = turns * (trips or 1)
                loops.append(Loop(x.name, op_name_of(x.rest), inside, trips is not None))
                walk(attribute(x, "body"), inside, x.name)
            elif x.op in ("call", "conditional", "async-start"):
                for branch in inner:
                    walk(branch, turns, loop)
            else:
                body = computations[inner[0]] if x.op in FUSIONS else None
                dots = sum(_dots(computations, inner[0])) if body else _product(computation, x)
                op_name = op_name_of(x.rest) or (_inner_op_name(body) if body else "")
                opaque = x.op == "custom-call" and not dots
                moved = _moved_by_fusion(computation, x, body) if body else _moved(computation, x)
                found.append(Launch(x.name, x.op, op_name, x.shape, turns, moved, dots, opaque, loop))

    walk(entry, 1, "")
    return found, loops


def _inner_op_name(body: Computation) -> str:
    """A fusion of several outputs has no name of its own: that of the last instruction inside which has one."""
    names = (op_name_of(x.rest) for x in reversed(body.instructions.values()))
    return next(filter(None, names), "")


def _moved(computation: Computation, x: Instruction) -> int:
    size = lambda name: bytes_of(computation.instructions[name].shape)
    output = bytes_of(x.shape)
    if x.op in ("slice", "dynamic-slice"):
        return 2 * output
    if x.op == "gather":
        return 2 * output + size(x.operands[1])
    if x.op == "dynamic-update-slice":
        return 2 * size(x.operands[1])
    if x.op == "scatter":
        # The rows that are added to are read and written.
        return 3 * size(_updates(x)) + size(x.operands[1])
    if x.op == "copy-start":  # (destination, source, context)
        return 2 * size(x.operands[0])
    return output + sum(size(name) for name in dict.fromkeys(x.operands))


def _moved_by_fusion(outside: Computation, x: Instruction, body: Computation) -> int:
    read: dict[str, int] = {}
    for number, parameter in body.parameters().items():
        operand = x.operands[number]
        whole = bytes_of(outside.instructions[operand].shape)
        touched = sum(_touched(body, user, name, whole) for user, name in body.users(parameter))
        read[operand] = min(whole, read.get(operand, 0) + touched)
    root = body.source(body.root)
    outputs = [body.source(name) for name in root.operands] if root.op == "tuple" else [root]
    return sum(read.values()) + sum(_written(body, output) for output in outputs)


def _touched(body: Computation, user: Instruction, name: str, whole: int) -> int:
    """How many bytes of a parameter, `whole` in all, an instruction inside a fusion reads of its operand `name`."""
    if name == user.operands[0] and name not in user.operands[1:]:
        if user.op in ("slice", "dynamic-slice", "gather"):
            return bytes_of(user.shape)
        if user.op == "dynamic-update-slice":
            return 0
        if user.op == "scatter":
            return bytes_of(body.instructions[_updates(user)].shape)
    return whole


def _written(body: Computation, output: Instruction) -> int:
    """How many bytes of an output of a fusion are written. In place, only what is updated."""
    if output.op in ("dynamic-update-slice", "scatter") and body.source(output.operands[0]).op == "parameter":
        update = output.operands[1] if output.op == "dynamic-update-slice" else _updates(output)
        return bytes_of(body.instructions[update].shape)
    return bytes_of(output.shape)


def _updates(scatter: Instruction) -> str:
    """operands: the arrays, the indices, the updates. Scatters of several arrays at once do not occur in a step."""
    return scatter.operands[2]


def _dots(computations: dict[str, Computation], name: str) -> Iterator[int]:
    computation = computations[name]
    for x in computation.instructions.values():
        yield _product(computation, x)
        for inner in called_by(x):
            yield from _dots(computations, inner)


def _product(computation: Computation, x: Instruction) -> int:
    """FLOPs of a dot or of a call of cuBLAS; 0 for anything else."""
    if x.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.rest)
    elif x.op == "custom-call" and "__cublas" in x.rest:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', x.rest)
    else:
        return 0
    left = dimensions(computation.instructions[x.operands[0]].shape)
    depth = math.prod(left[axis] for axis in sizes_of(contracted[1].replace('"', "")))
    return 2 * math.prod(dimensions(x.shape)) * depth
