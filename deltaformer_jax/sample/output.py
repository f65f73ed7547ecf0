"""Printing texts one after the other although they are generated in parallel."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the program's --help imports this file, and must not import jax
    from deltaformer_jax.decoding import Piece


class Output:
    """Prints texts in order while all are being generated. The first unfinished text is printed as it grows.

    As JSON, each text is printed as one line when it is finished.
    """

    def __init__(self, prompts: list[str], as_json: bool):
        self._prompts = prompts
        self._json = as_json
        self._texts = [""] * len(prompts)
        self._tokens = [0] * len(prompts)
        self._logprobs: list[list[float]] = [[] for _ in prompts]
        self._finish: list[str | None] = [None] * len(prompts)
        self._turn = 0  # index of the text that is being printed
        self._shown = -1  # how many of its characters are printed; -1: not even its prompt

    def add(self, piece: Piece) -> None:
        self._texts[piece.row] += piece.text
        self._tokens[piece.row] += 1
        self._finish[piece.row] = piece.finish
        if piece.logprob is not None:
            self._logprobs[piece.row].append(piece.logprob)
        while self._turn < len(self._prompts) and self._show(self._turn):
            self._turn, self._shown = self._turn + 1, -1

    def _show(self, i: int) -> bool:
        """Print what is new of text i. Returns whether the text is finished."""
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
            **({"logprobs": self._logprobs[i]} if self._logprobs[i] else {}),
        }
