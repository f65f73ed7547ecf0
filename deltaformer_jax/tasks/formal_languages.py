"""Six tasks on strings: the input, then empty tokens at which the model gives the answer.

    x_1 … x_L  ∅ ∅ … ∅ (padding)        target at the i-th ∅: the answer's i-th symbol

The model does not see its earlier answers. The benchmark trains on lengths L uniform in 1 … 40 and tests on 41 … 500;
the score is the mean accuracy of the answer's symbols.

Source: Delétang et al., "Neural networks and the Chomsky hierarchy", 2022; Xu et al., DeltaFormer (NeurIPS 2025),
appendix D, Table 5.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from deltaformer_jax.tasks.draws import Draws
from deltaformer_jax.tasks.examples import Examples, check_least


@dataclasses.dataclass(frozen=True)
class StringTask:
    """The base class of the six tasks.

    A task defines `symbols`, the number of input symbols (the empty token has the id after them); `answers`, the number
    of answer symbols; `answer_length(L)`; and `solve`.

    Args:
      length: tokens per row, at least longest + answer_length(longest), and one more with `start`.
      shortest, longest: bounds of the input's length L, which is uniform between them.
      start: whether a row begins with a start token, at which nothing is asked. A model can write the first state of
        its memory there. Its id is the one after the empty token's.
    Raises ValueError for arguments that don't fit.
    `task(seed, indices)` -> Examples. input_vocabulary is symbols + 1, or symbols + 2 with `start`; target_vocabulary
    is answers.
    """

    length: int = 128
    shortest: int = 1
    longest: int = 40
    start: bool = False

    symbols: ClassVar[int] = 2
    answers: ClassVar[int] = 2

    def __post_init__(self):
        check_least("shortest", self.shortest, 1)
        check_least("longest", self.longest, self.shortest)
        least = self.longest + self.answer_length(self.longest) + self.start
        if self.length < least:
            raise ValueError(
                f"length={self.length}: must be at least {least}, the longest input ({self.longest}) and its answer"
                + " and the start token" * self.start
                + "; or choose a smaller longest"
            )

    @property
    def input_vocabulary(self) -> int:
        return self.symbols + 1 + self.start

    @property
    def target_vocabulary(self) -> int:
        return self.answers

    @staticmethod
    def answer_length(length):
        """The number of empty tokens after an input of `length` symbols; `length` is an int or an array."""
        return length

    def input_lengths(self, draws: Draws) -> np.ndarray:
        return self.shortest + draws.integers(1, self.longest - self.shortest + 1)[:, 0]

    def inputs(self, draws: Draws, lengths: np.ndarray) -> np.ndarray:
        """int64 [N, longest]: input symbols. Those after a row's length are ignored."""
        return draws.integers(self.longest, self.symbols)

    def solve(self, inputs: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The answers to inputs [N, longest]: (symbols int64 [N, A], lengths int64 [N]), A = answer_length(longest)."""
        raise NotImplementedError

    def __call__(self, seed: int | str, indices: np.ndarray) -> Examples:
        examples = self.without_start(seed, indices)
        if not self.start:
            return examples
        first = Examples(tokens=self.symbols + 1, targets=0, counted=False, real=True)
        return Examples(*(np.pad(x, ((0, 0), (1, 0)), constant_values=fill) for x, fill in zip(examples, first)))

    def without_start(self, seed: int | str, indices: np.ndarray) -> Examples:
        draws = Draws(seed, type(self).__name__, indices)
        lengths = self.input_lengths(draws)
        inputs = self.inputs(draws, lengths)
        answers, answered = self.solve(inputs, lengths)
        place = np.arange(self.length - self.start)
        ends = lengths + self.answer_length(lengths)
        given, real = place < lengths[:, None], place < ends[:, None]
        tokens = np.where(real, self.symbols, 0)
        tokens[:, : self.longest] = np.where(given[:, : self.longest], inputs, tokens[:, : self.longest])
        counted = ~given & (place < (lengths + answered)[:, None])
        symbol = np.clip(place - lengths[:, None], 0, answers.shape[1] - 1)
        targets = np.where(counted, np.take_along_axis(answers, symbol, axis=1), 0)
        return Examples(tokens.astype(np.int32), targets.astype(np.int32), counted, real)


@dataclasses.dataclass(frozen=True)
class ModularArithmetic(StringTask):
    """The value mod 5 of an expression of alternating digits and operators, such as 3 + 4 · 2 − 1.

    · binds tighter than + and −. Symbols: the digits 0 … 4, then 5 for +, 6 for −, 7 for ·. Lengths are uniform among
    the odd numbers from shortest to longest.

    `prefixes`: also ask at every digit for the value of the expression up to it. The benchmark asks only for the value
    of the whole expression.
    """

    prefixes: bool = False

    symbols, answers = 8, 5

    def __post_init__(self):
        super().__post_init__()
        if self.shortest == self.longest and self.longest % 2 == 0:
            raise ValueError(f"shortest={self.shortest}, longest={self.longest}: no odd length is between them")

    @staticmethod
    def answer_length(length):
        return 0 * length + 1

    def input_lengths(self, draws):
        first = self.shortest | 1
        return first + 2 * draws.integers(1, (self.longest - first) // 2 + 1)[:, 0]

    def inputs(self, draws, lengths):
        digits, operators = draws.integers(self.longest, 5), 5 + draws.integers(self.longest, 3)
        return np.where(np.arange(self.longest) % 2 == 0, digits, operators)

    def solve(self, inputs, lengths):
        return np.take_along_axis(self._values(inputs), lengths[:, None] // 2, axis=1), np.ones_like(lengths)

    @staticmethod
    def _values(inputs: np.ndarray) -> np.ndarray:
        """int64 [N, digits]: the value mod 5 of the expression up to each digit."""
        # The value is total + sign · product; product is that of the factors since the last + or −.
        product = inputs[:, 0]
        total, sign, values = np.zeros_like(product), np.ones_like(product), [product]
        for place in range(1, inputs.shape[1] - 1, 2):
            operator, digit = inputs[:, place], inputs[:, place + 1]
            adds = operator != 7
            total = np.where(adds, total + sign * product, total)
            sign = np.where(adds, np.where(operator == 5, 1, -1), sign)
            product = np.where(adds, digit, product * digit % 5)
            values.append((total + sign * product) % 5)
        return np.stack(values, axis=1)

    def without_start(self, seed, indices):
        examples = super().without_start(seed, indices)
        if not self.prefixes:
            return examples
        last = np.argmax(examples.counted, axis=1)[:, None]  # the place of ∅
        place = np.arange(self.length - self.start)
        digit = (place % 2 == 0) & (place < last)
        values = self._values(np.where(place < last, examples.tokens, 0)[:, : self.longest])
        values = np.take_along_axis(values, np.minimum(place // 2, values.shape[1] - 1)[None].repeat(len(values), 0), 1)
        targets = np.where(digit, values, examples.targets).astype(np.int32)
        return examples._replace(targets=targets, counted=examples.counted | digit)


class Parity(StringTask):
    """The number of ones in a string of 0 and 1, mod 2."""

    @staticmethod
    def answer_length(length):
        return 0 * length + 1

    def solve(self, inputs, lengths):
        inside = np.arange(self.longest) < lengths[:, None]
        return (np.sum(inputs * inside, axis=1) % 2)[:, None], np.ones_like(lengths)


class ReverseString(StringTask):
    """The reversed string x_L … x_1 of a string of 0 and 1."""

    def solve(self, inputs, lengths):
        places = np.maximum(lengths[:, None] - 1 - np.arange(self.longest), 0)
        return np.take_along_axis(inputs, places, axis=1), lengths


class DuplicateString(StringTask):
    """The string x x, for a string x of 0 and 1."""

    @staticmethod
    def answer_length(length):
        return 2 * length

    def solve(self, inputs, lengths):
        places = np.arange(2 * self.longest) % lengths[:, None]
        return np.take_along_axis(inputs, places, axis=1), 2 * lengths


class OddsFirst(StringTask):
    """x_2 x_4 … then x_1 x_3 …, for a string x of 0 and 1; in Python, x[1::2] + x[::2]."""

    def solve(self, inputs, lengths):
        place, odds = np.arange(self.longest), (lengths // 2)[:, None]
        places = np.where(place < odds, 2 * place + 1, 2 * (place - odds))
        return np.take_along_axis(inputs, np.minimum(places, self.longest - 1), axis=1), lengths


class StackManipulation(StringTask):
    """The input is a stack, bottom to top, then actions. The answer is the stack after them, top to bottom, and an end.

    Symbols: 0 and 1 for the stack's content, then 2 for POP, 3 for PUSH 0, 4 for PUSH 1. POP does nothing on an empty
    stack. The stack's first size is uniform in 1 … L − 1 (1 if L = 1); the actions are uniform. Answer symbols: 0, 1,
    and 2 for the terminator. Symbols up to and including the terminator are counted. There are always L + 1 empty
    tokens, so that their number does not reveal the length of the answer.
    """

    symbols, answers = 5, 3

    @staticmethod
    def answer_length(length):
        return length + 1

    def inputs(self, draws, lengths):
        size = 1 + draws.integers(1, np.maximum(lengths - 1, 1)[:, None])
        contents, actions = draws.integers(self.longest, 2), 2 + draws.integers(self.longest, 3)
        return np.where(np.arange(self.longest) < size, contents, actions)

    def solve(self, inputs, lengths):
        rows = np.arange(len(lengths))
        stack, height = np.zeros((len(lengths), self.longest + 1), np.int64), np.zeros_like(lengths)
        for place in range(self.longest):
            symbol, inside = inputs[:, place], place < lengths
            pushes = inside & (symbol != 2)
            stack[rows, height] = np.where(pushes, symbol % 3, stack[rows, height])  # 3 and 4 push 0 and 1
            height = np.where(pushes, height + 1, np.where(inside, np.maximum(height - 1, 0), height))
        down = height[:, None] - 1 - np.arange(self.longest + 1)
        answers = np.where(down >= 0, np.take_along_axis(stack, np.maximum(down, 0), axis=1), 2)
        return answers, height + 1
