"""Hints for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(given: Any, names: Iterable[str]) -> str | None:
    """The name most like the given one, or None if none is like it."""
    return next(iter(difflib.get_close_matches(str(given), list(names), n=1, cutoff=0.5)), None)


def did_you_mean(given: Any, names: Iterable[str], otherwise: str = "") -> str:
    """The end of an error message: "; did you mean NAME?", or `otherwise` if no name is like the given one."""
    near = nearest(given, names)
    return f"; did you mean {near}?" if near else otherwise
