"""What the devices of a compiled program send each other, counted from its optimised HLO text.

With n devices in a group and s the bytes of a device's operand, a device sends at least

    all-gather                     (n − 1) s
    reduce-scatter, all-to-all     (n − 1) / n · s
    all-reduce                     2 (n − 1) / n · s        a reduce-scatter, then an all-gather
    collective-permute             s

each as often as the loops around it turn. These are the figures of a ring, and the least that any way of sending needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from deltaformer_jax.compiled.hlo import (
    FUSIONS,
    Computation,
    Instruction,
    attribute,
    bytes_of,
    called_by,
    op_name_of,
    parse,
    sizes_of,
    trip_count,
)

_SENT = {
    "all-gather": lambda size, n: (n - 1) * size,
    "reduce-scatter": lambda size, n: (n - 1) * size // n,
    "all-to-all": lambda size, n: (n - 1) * size // n,
    "ragged-all-to-all": lambda size, n: (n - 1) * size // n,
    "all-reduce": lambda size, n: 2 * (n - 1) * size // n,
    "collective-permute": lambda size, n: size,
    "collective-broadcast": lambda size, n: size,
}
KINDS = tuple(_SENT)


class Collective(NamedTuple):
    """One collective instruction: what it sends in one turn, and how often it runs in the whole program."""

    kind: str  # one of KINDS
    shape: str  # of its result, as printed; for several arrays at once a tuple
    members: tuple[int, ...]  # the devices of one group that take part together, by number; of a permutation one pair
    operand: int  # bytes on a device
    sent: int  # bytes that a device sends in one turn
    turns: int
    op_name: str  # the JAX functions that it comes from, or ""
    loops: tuple[str, ...]  # the op_names of the loops around it, the outermost first

    @property
    def group(self) -> int:
        return len(self.members)


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of the HLO module `text`, which is compiled for `devices` devices, in the order of the text.

    All branches of a conditional are counted, and a loop whose trip count the text does not say counts once. An
    all-reduce of which only a slice is used, in one fusion, is how a TPU's program says reduce-scatter; a slice taken
    after it, outside, is not. One that runs
    beside other work stands in each fusion that it runs beside, as links of one chain, and counts once, outside of the
    innermost loops. Raises ValueError if the text has no entry computation.
    """
    computations, entry = parse(text)
    found: dict[tuple, Collective] = {}

    def walk(name: str, turns: int, loops: tuple[str, ...], fused: bool = False):
        computation = computations[name]
        for x in computation.instructions.values():
            kind = x.op.removesuffix("-start")
            if kind in _SENT:
                one = _collective(computation, x, kind, devices, turns, loops, fused)
                chain = re.search(r'chain_id="\d+"', x.rest)
                key = (chain[0], one.shape.partition("{")[0], one.op_name) if chain else (name, x.name)
                if key not in found or turns < found[key].turns:
                    found[key] = one
            elif x.op == "send" and "_xla_megascale_target" in x.rest:
                found[name, x.name] = _between_slices(computation, x, devices, turns, loops)
            elif x.op == "while":
                inside = turns * (trip_count(computations, x) or 1)
                walk(attribute(x, "body"), inside, (*loops, op_name_of(x.rest)))
            else:
                for inner in [*called_by(x), *_offloaded(x)]:
                    walk(inner, turns, loops, fused or x.op in FUSIONS)

    walk(entry, 1, ())
    return list(found.values())


def bytes_by_kind(found: Iterable[Collective]) -> dict[str, int]:
    """Kind -> the bytes that a device sends by it in the whole program, for each kind of KINDS."""
    total = dict.fromkeys(KINDS, 0)
    for x in found:
        total[x.kind] += x.turns * x.sent
    return total


def in_layers(found: Iterable[Collective]) -> list[Collective]:
    """Those inside the loops over a LanguageModel's layers, forward and backward."""
    return [x for x in found if any("_hidden)" in loop for loop in x.loops)]


def _collective(
    computation: Computation,
    x: Instruction,
    kind: str,
    devices: int,
    turns: int,
    loops: tuple[str, ...],
    fused: bool,
) -> Collective:
    operand = sum(bytes_of(computation.instructions[name].shape) for name in x.operands)
    if kind == "all-reduce" and fused and _only_sliced(computation, x):
        kind = "reduce-scatter"
    members = _members(x.rest, devices)
    sent = _SENT[kind](operand, len(members))
    return Collective(kind, x.shape, members, operand, sent, turns, op_name_of(x.rest), loops)


def _between_slices(
    computation: Computation, x: Instruction, devices: int, turns: int, loops: tuple[str, ...]
) -> Collective:
    """A collective between TPU slices, which the program hands to the hosts: the device sends and receives there.

    Slices follow each other in the mesh's order, so the first devices of all of them are `members`.
    """
    # Slices by number, "{1,2}x{0:3}", or devices, {{100000,200000},{100001,200001}} and {{100000->200000}}.
    slices = len(re.search(r'_xla_megascale_target="?\{+([\d,>-]+)\}', x.rest)[1].replace("->", ",").split(","))
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.rest)[1].lower().replace("_", "-")
    kind = "collective-permute" if kind == "one-to-one" else kind
    operand = bytes_of(computation.instructions[x.operands[0]].shape)
    members = tuple(range(0, devices, devices // slices))
    return Collective(kind, x.shape, members, operand, _SENT[kind](operand, slices), turns, op_name_of(x.rest), loops)


def _offloaded(x: Instruction) -> list[str]:
    """The computations of a custom call by which a TPU7x hands a collective to its sparse cores."""
    found = re.search(r"\bcalled_computations=\{([^}]*)\}", x.rest) if x.op == "custom-call" else None
    return re.findall(r"[\w.\-]+", found[1]) if found else []


def _only_sliced(computation: Computation, x: Instruction) -> bool:
    users = [user for user, _ in computation.users(x.name)]
    return bool(users) and all(user.op == "dynamic-slice" for user in users)


def _members(rest: str, devices: int) -> tuple[int, ...]:
    """The devices of an instruction's first group, by their numbers in the mesh's order.

    Groups are printed in one of three ways. {{0,1},{2,3}} lists them; [2,4]<=[4,2]T(1,0) says 2 groups of 4, the
    numbers 0 to 7 as an array of shape [4,2], transposed; mesh['a'=2,'b'=4] {'b'} names axes of a mesh, of which
    'b':(1)2 is a part of size 2 behind a part of size 1. No groups, or {}: all devices. A permutation names pairs.
    """
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return int(found[1]), int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
        places, stride, strides = np.zeros(1, int), 1, {}
        for name, size in reversed(sizes.items()):
            strides[name], stride = stride, stride * size
        for name, behind, part in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", found[2]):
            number = int(part) if part else sizes[name]
            step = strides[name] * (sizes[name] // (int(behind) * number) if part else 1)
            places = (places[:, None] + step * np.arange(number)).ravel()
        return tuple(places.tolist())
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        order = np.arange(devices).reshape(sizes_of(found[3]))
        return tuple(order.transpose(sizes_of(found[4]) if found[4] else None).ravel()[: int(found[2])].tolist())
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(sizes_of(found[1]))
    return tuple(range(devices))
