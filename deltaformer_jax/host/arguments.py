"""Flags that are needed before the command line is parsed, and values that are lists."""

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


def whole_numbers(text: str) -> list[int]:
    """The numbers of a text such as "5,6". Raises ValueError unless all are whole numbers of 0 or more."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{text!r}: give whole numbers, separated by commas, as in 5,6")
    return [int(part) for part in parts]
