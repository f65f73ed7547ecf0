"""Texts that grow side by side, printed one after the other."""

import json
import sys
from typing import Any


class Output:
    """Texts that grow side by side, printed one after the other: the first unfinished one as it grows."""

    def __init__(self, prompts: list[str], as_json: bool):
        self._prompts = prompts
        self._json = as_json
        self._texts = [""] * len(prompts)
        self._tokens = [0] * len(prompts)
        self._finish: list[str | None] = [None] * len(prompts)
        self._turn = 0  # whose text is on stdout
        self._shown = -1  # characters of it; -1: not even the prompt

    def add(self, i: int, text: str, finish: str | None, tokens: int = 1) -> None:
        self._texts[i] += text
        self._tokens[i] += tokens
        self._finish[i] = finish
        while self._turn < len(self._prompts) and self._show(self._turn):
            self._turn, self._shown = self._turn + 1, -1

    def _show(self, i: int) -> bool:
        """Prints what there is of text i; True if that is all."""
        done = self._finish[i] is not None
        if self._json:
            if done:
                print(json.dumps(self._record(i), ensure_ascii=False), flush=True)
            return done
        if self._shown < 0:
            if len(self._prompts) > 1:
                print(f"--- {i + 1} of {len(self._prompts)}")
            sys.stdout.write(self._prompts[i])
            self._shown = 0
        sys.stdout.write(self._texts[i][self._shown :])
        self._shown = len(self._texts[i])
        if done:
            print()
        sys.stdout.flush()
        return done

    def _record(self, i: int) -> dict[str, Any]:
        return {
            "prompt": self._prompts[i],
            "text": self._texts[i],
            "tokens": self._tokens[i],
            "finish": self._finish[i],
        }
