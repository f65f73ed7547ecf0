"""Generators of long texts that end in a question, over any tokenizer.

The forms are those of RULER (Hsieh et al., arXiv 2404.06654): a needle in repeated sentences, one among several needles
with other keys, a chain of variables, the commonest words of a list. The needle by depth and length is Kamradt's
test, github.com/gkamradt/LLMTest_NeedleInAHaystack.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # the names of the tasks are known before jax is imported
    from deltaformer_jax.data import Tokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEYS = (
    "amber basin cedar delta ember falcon garnet harbor island jasmine kernel lantern meadow nectar orchard pepper "
    "quartz ribbon saddle timber umbrella velvet walnut yonder zephyr anchor bridge copper dragon engine feather"
).split()
ANSWER_TOKENS = 8  # beside those of the answer itself, which a model may begin with a space or a quotation mark
OTHER_KEYS = 3
CHAIN = 4  # variables that share a value
COMMON, OFTEN, SELDOM = 3, 8, 2  # how many common words are asked for; how often each kind comes


class Example(NamedTuple):
    """A text and what its continuation should hold. `text` and the answer have at most the wanted number of tokens.

    `answers` are all to be found in the continuation, of which `answer_tokens` are generated. `depth` is where the
    needle lies: 0 is the text's beginning and 1 its end; None for tasks without one place.
    """

    text: str
    answers: tuple[str, ...]
    answer_tokens: int
    depth: float | None


def needle(draw: random.Random, tokenizer: Tokenizer, length: int, depth: float) -> Example:
    """A number for a word, in repeated sentences, at `depth`; the question names the word."""
    return _needles(draw, tokenizer, length, depth, others=0)


def needle_multikey(draw: random.Random, tokenizer: Tokenizer, length: int, depth: float) -> Example:
    """As `needle`, with the numbers of three other words at places of their own."""
    return _needles(draw, tokenizer, length, depth, others=OTHER_KEYS)


def _needles(draw, tokenizer, length, depth, others):
    keys = draw.sample(KEYS, others + 1)
    values = [str(draw.randint(1000, 9999)) for _ in keys]
    places = [depth, *(draw.random() for _ in range(others))]
    said = [f"The special magic number for {key} is: {value}." for key, value in zip(keys, values)]
    head = "Some special magic numbers are hidden in the following text. Make sure to memorize them.\n"
    tail = f"\nThe special magic number for {keys[0]} mentioned in the text is:"

    def text(count):
        lines = [FILLER] * count
        # From the end, so that a place is counted in filler alone, whatever is put in before it.
        for place, needle in sorted(zip(places, said), reverse=True):
            lines.insert(round(place * count), needle)
        return head + " ".join(lines) + tail

    return _fitted(text, FILLER, tokenizer, length, (values[0],), depth)


def variable_tracking(draw: random.Random, tokenizer: Tokenizer, length: int, depth: None = None) -> Example:
    """A value, and variables that take it from one another, in order, anywhere in the text: which ones have it?"""
    letters = draw.sample("BCDEFGHJKLMNPQRSTUVWXYZ", 2 * CHAIN)
    chains = [letters[:CHAIN], letters[CHAIN:]]
    values = draw.sample(range(10000, 99999), 2)
    lines, places = [], []
    for chain, value in zip(chains, values):
        lines += [f"VAR {chain[0]} = {value}.", *(f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(chain))]
        places += sorted(draw.random() for _ in chain)
    head = "Memorize and track the chains of variable assignment hidden in the following text.\n"
    tail = f"\nThe variables that are assigned the value {values[0]}, in the order of the text, are: VAR"

    def text(count):
        mixed = [FILLER] * count
        # Sorting is stable: of one place, lines keep their order, which is reversed for the insertions.
        for place, line in sorted(zip(places, lines), key=lambda pair: pair[0])[::-1]:
            mixed.insert(round(place * count), line)
        return head + " ".join(mixed) + tail

    return _fitted(
        text, FILLER, tokenizer, length, tuple(chains[0]), None, written=" ".join(f"{x}, VAR" for x in letters)
    )


def common_words(draw: random.Random, tokenizer: Tokenizer, length: int, depth: None = None) -> Example:
    """A list of words, of which three come eight times and the others twice: which three are the commonest?"""
    common = draw.sample(KEYS, COMMON)
    seed = draw.random()
    head = "Below is a numbered list of words. Memorize the ones that appear most often.\n"
    tail = f"\nThe {COMMON} most common words in the list are:"

    def text(count):
        # `count` words that are seldom, made of others; the draw is the same for each count.
        again = random.Random(seed)
        others = [key for key in KEYS if key not in common]
        parts = 2
        while (there := sum(len(others) ** n for n in range(2, parts + 1))) < count:
            parts += 1
        seldom = [_made(others, i) for i in again.sample(range(there), count)]
        words = common * OFTEN + seldom * SELDOM
        again.shuffle(words)
        return head + " ".join(f"{i}. {word}" for i, word in enumerate(words, 1)) + tail

    unit = " ".join(f"{1000 + i}. {KEYS[i]}{KEYS[-i]}" for i in range(1, SELDOM + 1))
    return _fitted(text, unit, tokenizer, length, tuple(common), None)


def _made(keys: list[str], i: int) -> str:
    """The i-th of the words that are made of keys: first all of two keys, then all of three, and so on."""
    parts = 2
    while i >= len(keys) ** parts:
        i, parts = i - len(keys) ** parts, parts + 1
    places = [i // len(keys) ** n % len(keys) for n in range(parts)]
    return "".join(keys[place] for place in reversed(places))


def _fitted(text: Callable[[int], str], unit: str, tokenizer, length, answers, depth, written=None) -> Example:
    """The Example whose text has as many units of filler as fit in `length` tokens with the answer.

    Raises ValueError if not even the text without filler fits.
    """
    room = len(tokenizer.encode(" " + (written or ", ".join(answers)))) + ANSWER_TOKENS
    size = lambda count: len(tokenizer.encode_prompt(text(count))) + room
    if size(0) > length:
        raise ValueError(f"--lengths {length}: this task takes {size(0)} tokens without any filler; give more")
    count, one = 0, len(tokenizer.encode(" " + unit))
    for _ in range(20):  # units differ in size; a few steps come near, whatever the length
        step = int((length - size(count)) / one)
        count = max(0, count + step)
        if not step:
            break
    while size(count) > length:
        count -= 1
    while size(count + 1) <= length:
        count += 1
    return Example(text(count), answers, room, depth)


# Name -> (the generator, whether it has a needle at one depth).
TASKS: dict[str, tuple[Callable[..., Example], bool]] = {
    "needle": (needle, True),
    "needle_multikey": (needle_multikey, True),
    "variable_tracking": (variable_tracking, False),
    "common_words": (common_words, False),
}
