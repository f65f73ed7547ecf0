"""Flags that are needed before the command line is parsed."""

from __future__ import annotations


def value_of(flag: str, argv: list[str]) -> str | None:
    """The last value of --flag, or None. Raises ValueError if the flag ends the line."""
    found = None
    for i, argument in enumerate(argv[1:], 1):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == flag:
            if not equals and i + 1 == len(argv):
                raise ValueError(f"--{flag}: give a value")
            found = value if equals else argv[i + 1]
    return found
