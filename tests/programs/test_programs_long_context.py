"""Long contexts: what the texts hide and where, how answers are scored, and the picture."""

import collections
import random
import re

import numpy as np
import pytest

from deltaformer_jax.data import ByteTokenizer, train_bpe
from deltaformer_jax.evaluate.long_context import generators
from deltaformer_jax.evaluate.long_context.accuracy import accuracy, examples, share_found
from deltaformer_jax.evaluate.long_context.picture import heat_map

BYTES = ByteTokenizer()
BPE = train_bpe([f"{generators.FILLER} {' '.join(generators.KEYS)} the special magic number VAR = 12 " * 9], 600)
DEPTHS = (0.0, 0.3, 1.0)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
@pytest.mark.parametrize("task", generators.TASKS)
def test_texts_fill_their_length(task, tokenizer):
    unit = len(tokenizer.encode(" " + generators.FILLER)) + 8
    for length in (1500, 4001):
        found = examples(task, tokenizer, length, DEPTHS, 2, 0)
        assert len(found) == (6 if generators.TASKS[task][1] else 2)
        assert len({example.text for example in found}) == len(found)
        for example in found:
            size = 1 + len(tokenizer.encode(example.text)) + example.answer_tokens
            assert length - unit < size <= length
            assert len(tokenizer.encode(" " + ", ".join(example.answers))) < example.answer_tokens
        assert (
            found == examples(task, tokenizer, length, DEPTHS, 2, 0) != examples(task, tokenizer, length, DEPTHS, 2, 1)
        )


@pytest.mark.parametrize(("task", "needles"), [("needle", 1), ("needle_multikey", 4)])
def test_a_needle_lies_at_its_depth(task, needles):
    for depth in (0.0, 0.25, 0.5, 1.0):
        (example,) = examples(task, BYTES, 6000, [depth], 1, 3)
        said = re.findall(r"The special magic number for (\w+) is: (\d{4})\.", example.text)
        asked = re.search(r"The special magic number for (\w+) mentioned in the text is:$", example.text)[1]
        assert len(said) == needles == len({key for key, _ in said})
        assert example.answers == (dict(said)[asked],) and example.depth == depth
        lines = re.sub(rf"The special magic number for (?!{asked} )\w+ is: \d+\. ?", "", example.text)
        before, after = lines.split(f"number for {asked} is:")
        before, after = before.count("There and back"), after.count("There and back")
        assert before + after > 40 and before == round(depth * (before + after))


def test_variables_are_those_of_the_value():
    for seed in range(5):
        (example,) = examples("variable_tracking", BYTES, 4000, DEPTHS, 1, seed)
        value = re.search(r"assigned the value (\d+)", example.text)[1]
        known = {}
        for name, other, number in re.findall(r"VAR (\w) = (?:VAR (\w)|(\d+))\.", example.text):
            known[name] = known[other] if other else number  # KeyError: used before it is assigned
        assert len(known) == 8 and [name for name in known if known[name] == value] == list(example.answers)
        assert example.text.endswith("are: VAR")


def test_common_words_are_the_commonest():
    (example,) = examples("common_words", BYTES, 3000, DEPTHS, 1, 0)
    words = re.findall(r"\d+\. (\w+)", example.text)
    counts = {word: words.count(word) for word in words}
    assert {word for word in counts if counts[word] == 8} == set(example.answers)
    assert {counts[word] for word in counts} == {2, 8} and len(counts) > 30


def test_words_never_run_out():
    """There are 784 words of two keys: 29,000 bytes. Longer lists have words of three."""
    length = 65536
    (example,) = examples("common_words", BYTES, length, DEPTHS, 1, 0)
    assert length - 80 < 1 + len(example.text) + example.answer_tokens <= length
    counts = collections.Counter(re.findall(r"\d+\. (\w+)", example.text))
    assert {word for word in counts if counts[word] == 8} == set(example.answers)
    assert set(counts.values()) == {2, 8} and len(counts) > 784


def test_scores_go_to_their_length_and_depth():
    """One that finds a needle only in the first half of texts of fewer than 2000 bytes."""

    def answer(texts, most):
        told = []
        for text, room in zip(texts, most, strict=True):
            key = re.search(r"number for (\w+) mentioned", text)[1]
            place = re.search(rf"number for {key} is: (\d+)\.", text)
            near = place.start() < len(text) / 2 and len(text) < 2000
            told.append(f" {place[1]}, surely"[:room] if near else "")
        return told

    asked = {length: examples("needle_multikey", BYTES, length, [0.0, 1.0], 3, 0) for length in (1000, 3000)}
    found = accuracy(answer, "needle_multikey", asked)
    assert [(r["length"], r["depth"], r["accuracy"], r["examples"]) for r in found] == [
        (1000, 0.0, 1.0, 3),
        (1000, 1.0, 0.0, 3),
        (3000, 0.0, 0.0, 3),
        (3000, 1.0, 0.0, 3),
    ]
    assert share_found(["1234"], " 12345") == 0 and share_found(["1234"], ' "1234".') == 1
    assert share_found(["B", "C", "D", "F"], "b, VAR F, VAR X") == 0.5


def test_errors_name_the_flag():
    with pytest.raises(ValueError, match="--lengths 100: this task takes 2"):
        examples("needle", BYTES, 100, DEPTHS, 1, 0)
    with pytest.raises(ValueError, match="--tasks haystack: the long-context tasks are needle, needle_multikey"):
        examples("haystack", BYTES, 100, DEPTHS, 1, 0)


def test_the_picture_shows_every_number():
    draw = random.Random(0)
    records = [
        {"task": task, "length": length, "depth": depth, "examples": 1, "accuracy": round(draw.random(), 2)}
        for task, (_, has_depth) in generators.TASKS.items()
        for length in (256, 512, 1024)
        for depth in (DEPTHS if has_depth else (None,))
    ]
    drawn = heat_map(records, "mine", trained=512)
    panels = [axes for axes in drawn.axes if axes.images]
    assert [panel.get_title(loc="left") for panel in panels] == [task.replace("_", " ") for task in generators.TASKS]
    shown = np.concatenate([np.asarray(panel.images[0].get_array()).ravel() for panel in panels])
    texts = [text.get_text() for panel in panels for text in panel.texts if text.get_text().isdigit()]
    assert sorted(shown) == sorted(record["accuracy"] for record in records)
    assert texts == [f"{100 * value:.0f}" for value in shown]
    assert "At 1,024 tokens mine finds" in drawn.get_suptitle()
    assert sum(len(panel.lines) for panel in panels) == 4  # where training ended
