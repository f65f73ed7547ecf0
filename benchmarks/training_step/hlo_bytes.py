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

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

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
            called = _called(x)
            if x.op == "while":
                known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', x.rest)
                inside = turns * (int(known[1]) if known else 1)
                loops.append(Loop(x.name, _op_name(x.rest), inside, bool(known)))
                walk(_attribute(x, "body"), inside, x.name)
            elif x.op in ("call", "conditional", "async-start"):
                for branch in called:
                    walk(branch, turns, loop)
            else:
                body = computations[called[0]] if x.op in FUSIONS else None
                dots = sum(_dots(computations, called[0])) if body else _product(computation, x)
                op_name = _op_name(x.rest) or (_inner_op_name(body) if body else "")
                opaque = x.op == "custom-call" and not dots
                moved = _moved_by_fusion(computation, x, body) if body else _moved(computation, x)
                found.append(Launch(x.name, x.op, op_name, x.shape, turns, moved, dots, opaque, loop))

    walk(entry, 1, "")
    return found, loops


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
        yield kind, math.prod(_sizes(sizes))


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _dimensions(shape: str) -> list[int]:
    """The sizes of the first array in a printed shape."""
    return _sizes(re.search(r"\[([\d,]*)\]", shape)[1])


def _width(kind: str) -> int:
    """Bits of an element: 16 for bf16, 8 for f8e4m3fn and pred, 0 for a token."""
    if kind == "pred":
        return 8
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 0


def _attribute(instruction: Instruction, name: str) -> str:
    return re.search(rf"\b{name}=%?([\w.\-]+)", instruction.rest)[1]


def _called(instruction: Instruction) -> list[str]:
    """The computations that a fusion, a call or a conditional executes."""
    if instruction.op in (*FUSIONS, "async-start", "call", "conditional"):
        keys = r"calls|to_apply|true_computation|false_computation|branch_computations"
        found = re.findall(rf"\b(?:{keys})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.rest)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]
    return []


def _op_name(rest: str) -> str:
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', rest)
    return found[1] if found else ""


def _inner_op_name(body: Computation) -> str:
    """A fusion of several outputs has no name of its own: that of the last instruction inside which has one."""
    names = (_op_name(x.rest) for x in reversed(body.instructions.values()))
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
        for inner in _called(x):
            yield from _dots(computations, inner)


def _product(computation: Computation, x: Instruction) -> int:
    """FLOPs of a dot or of a call of cuBLAS; 0 for anything else."""
    if x.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.rest)
    elif x.op == "custom-call" and "__cublas" in x.rest:
        contracted = re.search(r'"lhs_contracting_dimensions":\[([\d,"]*)\]', x.rest)
    else:
        return 0
    left = _dimensions(computation.instructions[x.operands[0]].shape)
    depth = math.prod(left[axis] for axis in _sizes(contracted[1].replace('"', "")))
    return 2 * math.prod(_dimensions(x.shape)) * depth
