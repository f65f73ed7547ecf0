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
from math import prod
from typing import NamedTuple

from deltaformer_jax.compiled.hlo import (
    Computation,
    Instruction,
    attribute,
    bytes_of,
    called_by,
    op_name_of,
    parse,
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
    group: int  # how many devices take part together
    operand: int  # bytes on a device
    sent: int  # bytes that a device sends in one turn
    turns: int
    op_name: str  # the JAX functions that it comes from, or ""
    loops: tuple[str, ...]  # the op_names of the loops around it, the outermost first


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of the HLO module `text`, which is compiled for `devices` devices, in the order of the text.

    All branches of a conditional are counted, and a loop whose trip count the text does not say counts once. An
    all-reduce of which only a slice is used, in one fusion, is how a TPU's program says reduce-scatter. One that runs
    beside other work stands in each fusion that it runs beside, as links of one chain, and counts once, outside of the
    innermost loops. Raises ValueError if the text has no entry computation.
    """
    computations, entry = parse(text)
    found: dict[tuple, Collective] = {}

    def walk(name: str, turns: int, loops: tuple[str, ...]):
        computation = computations[name]
        for x in computation.instructions.values():
            kind = x.op.removesuffix("-start")
            if kind in _SENT:
                one = _collective(computation, x, kind, devices, turns, loops)
                chain = re.search(r'chain_id="\d+"', x.rest)
                key = (chain[0], one.shape.partition("{")[0], one.op_name) if chain else (name, x.name)
                if key not in found or turns < found[key].turns:
                    found[key] = one
            elif x.op == "while":
                inside = turns * (trip_count(computations, x) or 1)
                walk(attribute(x, "body"), inside, (*loops, op_name_of(x.rest)))
            else:
                for inner in called_by(x):
                    walk(inner, turns, loops)

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
    computation: Computation, x: Instruction, kind: str, devices: int, turns: int, loops: tuple[str, ...]
) -> Collective:
    operand = sum(bytes_of(computation.instructions[name].shape) for name in x.operands)
    if kind == "all-reduce" and _only_sliced(computation, x):
        kind = "reduce-scatter"
    group = _group(x.rest, devices)
    return Collective(kind, x.shape, group, operand, _SENT[kind](operand, group), turns, op_name_of(x.rest), loops)


def _only_sliced(computation: Computation, x: Instruction) -> bool:
    users = [user for user, _ in computation.users(x.name)]
    return bool(users) and all(user.op == "dynamic-slice" for user in users)


def _group(rest: str, devices: int) -> int:
    """The number of devices in one of an instruction's groups, printed in one of three ways.

    {{0,1},{2,3}} lists them; [2,4]<=[8] says 2 groups of 4; mesh['a'=2,'b'=4] {'b'} names axes of a mesh, of which
    'b':(1)2 is a part of size 2. No groups, or {}: all devices.
    """
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
        named = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found[2])
        return prod(int(part) if part else sizes[name] for name, part in named)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    return devices
