"""The text of an optimised HLO module (`compiled.as_text()`), read into instructions and computations."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# The second is the asynchronous one: it starts here, and what follows need not wait for it before its "fusion-done".
FUSIONS = ("fusion", "fusion-start")


class Instruction(NamedTuple):
    name: str
    shape: str  # as printed: "f32[2,3]{1,0}", or a tuple "(f32[2], s32[])"
    op: str
    operands: tuple[str, ...]  # names
    rest: str  # the printed attributes; for a parameter its number


@dataclasses.dataclass
class Computation:
    instructions: dict[str, Instruction]
    root: str = ""

    def parameters(self) -> dict[int, str]:
        return {int(x.rest.partition(")")[0]): x.name for x in self.instructions.values() if x.op == "parameter"}

    def source(self, name: str) -> Instruction:
        """The instruction `name`, or what it is a bitcast of."""
        instruction = self.instructions[name]
        while instruction.op == "bitcast":
            instruction = self.instructions[instruction.operands[0]]
        return instruction

    def users(self, name: str) -> Iterator[tuple[Instruction, str]]:
        """(user, the operand's name in it) for each instruction that reads `name`, also through bitcasts."""
        for user in self.instructions.values():
            if name in user.operands:
                if user.op == "bitcast":
                    yield from self.users(user.name)
                else:
                    yield user, name


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, the entry's name) of an HLO module's text."""
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if current is None:
            if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line):
                current = computations[found[2]] = Computation({})
                entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current.instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                current.root = instruction.name
    if not entry:
        raise ValueError("this is no HLO module: it has no ENTRY computation")
    return computations, entry


def bytes_of(shape: str) -> int:
    """The bytes of a printed shape, which may be a tuple."""
    return sum(size * _width(kind) // 8 for kind, size in _arrays(shape))


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    # A line is long where the program of a kernel follows; long tuples number their elements in comments.
    head = re.sub(r"/\*index=\d+\*/", "", line[found.end() :])
    end = _closing(head, 0) if head.startswith("(") else head.index(" ")
    shape, after = head[:end], head[end:].lstrip()
    op, _, after = after.partition("(")
    if op in ("parameter", "constant"):
        return Instruction(found[1], shape, op, (), after)
    end = _closing("(" + after, 0) - 1
    return Instruction(found[1], shape, op, tuple(re.findall(r"%([\w.\-]+)", after[:end])), after[end:])


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _arrays(shape: str) -> Iterator[tuple[str, int]]:
    """(element type, number of elements) of the arrays in a printed shape."""
    for kind, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        yield kind, math.prod(sizes_of(sizes))


def sizes_of(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def dimensions(shape: str) -> list[int]:
    """The sizes of the first array in a printed shape."""
    return sizes_of(re.search(r"\[([\d,]*)\]", shape)[1])


def _width(kind: str) -> int:
    """Bits of an element: 16 for bf16, 8 for f8e4m3fn and pred, 0 for a token."""
    if kind == "pred":
        return 8
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 0


def attribute(instruction: Instruction, name: str) -> str:
    return re.search(rf"\b{name}=%?([\w.\-]+)", instruction.rest)[1]


def called_by(instruction: Instruction) -> list[str]:
    """The computations that a fusion, a call or a conditional executes."""
    if instruction.op in (*FUSIONS, "async-start", "call", "conditional"):
        keys = r"calls|to_apply|true_computation|false_computation|branch_computations"
        found = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.rest)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]
    return []


def trip_count(computations: dict[str, Computation], loop: Instruction) -> int | None:
    """How often a while runs its body; None if the text does not say.

    CPUs and GPUs print it. For a TPU it follows from the condition `counter < constant`, of loops that count from 0 by
    1 as those of `lax.scan` do.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition = computations[attribute(loop, "condition")]
    root = condition.instructions[condition.root]
    if root.op == "compare" and "direction=LT" in root.rest:
        limit = condition.instructions[root.operands[1]]
        if limit.op == "constant":
            return int(limit.rest.partition(")")[0])
    return None


def op_name_of(rest: str) -> str:
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', rest)
    return found[1] if found else ""
