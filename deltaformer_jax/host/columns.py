"""A table as text."""

from __future__ import annotations

from collections.abc import Sequence


def right_aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of equally many texts, each column as wide as its longest, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in lines)
