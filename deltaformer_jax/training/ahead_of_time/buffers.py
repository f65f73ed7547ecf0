"""The largest arrays that a compiled program holds at the moment when it holds most.

XLA writes them into a folder while it compiles (`DUMP`), even if the program then turns out not to fit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Buffer(NamedTuple):
    """An array in a device's memory: bytes, shape as XLA prints it, and the JAX functions that it comes from."""

    bytes: int
    shape: str
    origin: str


def dump_options(folder: str) -> dict[str, str | bool]:
    """Compiler options under which XLA describes the program's memory in `folder`."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def largest_buffers(folder: str, number: int) -> list[Buffer]:
    """The `number` largest arrays at the peak, of the largest program described in `folder`; [] if there is none."""
    described = sorted(Path(folder).glob("*live-range.txt"), key=lambda path: path.stat().st_size)
    if not described:
        return []
    peak = described[-1].read_text(encoding="utf-8").partition("(peak):")[2].partition("Stack trace")[0]
    found = re.findall(r"^\s+([\w.\-]+)\{([\d,]*)\}: (\d+) bytes", peak, re.MULTILINE)
    largest = sorted(((int(size), name, index) for name, index, size in found), reverse=True)[:number]
    text = Path(str(described[-1]).replace("-live-range", "")).read_text(encoding="utf-8")
    return [Buffer(size, *_described(text, name, index)) for size, name, index in largest]


def _described(text: str, name: str, index: str) -> tuple[str, str]:
    """(shape, origin) of the instruction `name` of an HLO module's text; of a tuple the shape of element `index`."""
    line = re.search(rf"^\s+(?:ROOT )?%?{re.escape(name)} = (.*)$", text, re.MULTILINE)
    if not line:
        return "?", name
    shapes = re.findall(r"\w+\[[\d,]*\]", line[1].partition(", metadata=")[0])
    origin = re.search(r'op_name="((?:[^"\\]|\\.)*)"', line[1])
    shape = shapes[min(int(index.partition(",")[0] or 0), len(shapes) - 1)]
    return shape, origin[1].replace("\\'", "'") if origin else f"{name}{{{index}}}"


def program_text(folder: str) -> str:
    """The optimised HLO text of the largest program described in `folder`, also of one that does not fit."""
    return max(Path(folder).glob("*after_optimizations.txt"), key=lambda path: path.stat().st_size).read_text(
        encoding="utf-8"
    )


def total_bytes(folder: str) -> int:
    """What the largest program described in `folder` needs in a device's main memory."""
    reports = [path.read_text(encoding="utf-8") for path in Path(folder).glob("*memory-usage-report.txt")]
    return max(int(found[1]) for text in reports if (found := re.search(r"Total bytes: (\d+)", text)))
