"""argparse with one-line errors that name the nearest flag, and exit code 2. It imports nothing large."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from deltaformer_jax.host.spelling import did_you_mean


class ArgumentParser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviated flags. `prog` is "python -m PROGRAM"; errors begin with PROGRAM."""

    def __init__(self, **options: Any):
        self._flags: list[str] = []
        super().__init__(allow_abbrev=False, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self._flags.extend(action.option_strings)
        return action

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        # Check for unknown flags before argparse does: it would first report a misspelt required flag as missing.
        for argument in args:
            if argument == "--":
                break
            name = argument.partition("=")[0]
            # As in argparse, these are values and not flags: "-", "-3", "- a text".
            is_value = not re.match(r"-[^\d.]", argument) or " " in argument
            if not is_value and name not in self._flags:
                self.error(f"{name}: no such flag{self._nearest(name)}")
        return super().parse_args(args, namespace)

    def _nearest(self, name: str) -> str:
        known = [flag for flag in self._flags if flag.startswith("--")]
        return did_you_mean(f"--{name.lstrip('-')}", known, f"; the flags are {', '.join(known)}")

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
            message = f"{missing[1]}: missing; give it (--help shows how)"
        if extra := re.fullmatch(r"unrecognized arguments: (.*)", message):
            message = f"{extra[1]}: unexpected argument; --help lists the arguments"
        self.exit(2, f"{self.prog.removeprefix('python -m ')}: error: {' '.join(message.split())}\n")
