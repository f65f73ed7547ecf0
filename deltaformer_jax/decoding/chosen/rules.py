"""The two rules, as a caller gives them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from deltaformer_jax.data import Tokenizer
from deltaformer_jax.data.tokenizer.characters import tokens_of
from deltaformer_jax.decoding.requests import items, number, whole

PAPERS = ".,?!;: \t\n"  # SepLLM's separators
OF_BYTES = "\n.;:"  # a fifth of all bytes of a text are spaces


@dataclasses.dataclass(frozen=True)
class Streaming:
    """A streaming cache: at most `capacity` tokens, whatever the length of the text.

        Streaming(initial=4, separators=64, window=256, capacity=800)

    When a row has `capacity` tokens, these stay: the first `initial`, the last `window`, and of the separators between
    them the last `separators`. They are then numbered by their places in the cache, 0, 1, 2, …, and their keys are
    rotated to these positions. Until then nothing changes, up to the rounding of programs of other shapes.

    A layer that was trained with a window, and with separators behind it, drops what it does not see any more: its own
    first tokens and window stay, which `initial` and `window` must not be less than, and the last `separators` of its
    own separators. Its entries keep their positions in the text, so that nothing changes until a separator is dropped.

    characters: a token is a separator if its text consists of these. None: SepLLM's . , ? ! ; : space tab newline, and
      for a tokenizer of bytes newline . ; : alone. A list of ids: these.
    fold: what is dropped of a segment is not lost at once but folded into its separator (`ops.fold_segments`), in
      layers without a window.
    all_places: layers with separators behind a window number their entries by places too, for texts much longer than
      those of the training: no distance is then larger than `capacity`.

    Raises ValueError or TypeError, naming the argument, unless initial + separators + window < capacity.
    """

    initial: int
    separators: int
    window: int
    capacity: int
    characters: str | Sequence[int] | None = None
    fold: bool = False
    all_places: bool = False

    def __post_init__(self):
        for name, least in (("initial", 0), ("separators", 0), ("window", 1), ("capacity", 2)):
            object.__setattr__(self, name, whole(f"cache: {name}", getattr(self, name), least))
        if self.stays >= self.capacity:
            raise ValueError(
                f"cache: capacity = {self.capacity}: give more than initial + separators + window = {self.stays}"
            )
        for name in ("fold", "all_places"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"cache: {name} = {getattr(self, name)!r:.60}: give True or False")
        if self.characters is not None and not isinstance(self.characters, str):
            object.__setattr__(self, "characters", tuple(items("cache: characters", self.characters, "text or ids")))

    @property
    def stays(self) -> int:
        """The most tokens that stay when the others are dropped."""
        return self.initial + self.separators + self.window


@dataclasses.dataclass(frozen=True)
class Evicted:
    """One eviction after the prompt: of n tokens, ⌈keep n⌉ stay, with their positions, and what is generated is added.

        Evicted(keep=0.2, proxy=32, random=0.06)

    The last `proxy` tokens stay. Of the others stay `random` n, drawn by softmax(F), and those with the largest F, as
    many as there is room for; F is what the proxies read of a token (`ops.proxy_scores`), plus `write_weight` times
    what DeltaFormer's write compares of it. Each layer chooses for itself, and with `by_head` each of its key heads, by
    what the queries of its group read. A prompt of at most `proxy` tokens stays whole. keep = 1: all stay, and nothing
    is done.

    Raises ValueError or TypeError, naming the argument.
    """

    keep: float
    proxy: int = 32
    random: float = 0.0
    write_weight: float = 0.0
    by_head: bool = False

    def __post_init__(self):
        if not 0 < number("keep", self.keep, "a share above 0, at most 1 (all tokens)") <= 1:
            raise ValueError(f"keep = {self.keep}: give a share above 0, at most 1 (all tokens)")
        object.__setattr__(self, "proxy", whole("proxy", self.proxy, 1))
        if not 0 <= number("random", self.random, "a share of the prompt") <= self.keep:
            raise ValueError(f"random = {self.random}: give a share of the prompt from 0 to keep = {self.keep}")
        if not 0 <= number("write_weight", self.write_weight, "0 or more") < math.inf:
            raise ValueError(f"write_weight = {self.write_weight}: give 0 or more")
        if not isinstance(self.by_head, bool):
            raise TypeError(f"by_head = {self.by_head!r:.60}: give True or False")

    def counts(self, length: int) -> tuple[int, int]:
        """(how many of a prompt's `length` tokens stay, how many of these are drawn)."""
        share = lambda part: round(part * length, 6)  # else 0.1 · 30 would be more than 3
        kept = max(math.ceil(share(self.keep)), min(length, self.proxy))
        return kept, min(round(share(self.random)), kept - min(length, self.proxy))


def separator_ids(tokenizer: Tokenizer, characters: str | None = None) -> tuple[int, ...]:
    """The ids whose text consists of these characters only; None: the default of `Streaming.characters`.

    Raises ValueError if there is none.
    """
    if characters is None:
        characters = OF_BYTES if tokenizer.kind == "bytes" else PAPERS
    ids = tuple(tokens_of(characters, tokenizer))
    if not ids:
        raise ValueError(
            f"separators: the tokenizer has no token that consists of {characters!r} only; give other characters"
        )
    return ids
