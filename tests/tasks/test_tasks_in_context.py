"""The tasks that ask what followed before, against their definitions, one row and one token at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaformer_jax import tasks
from deltaformer_jax.tasks.draws import Draws

seeds = st.one_of(st.integers(0, 2**40), st.sampled_from(["eval", "3 eval"]))
indices = st.lists(st.integers(0, 2**60), min_size=1, max_size=4, unique=True).map(np.array)

# Induction.


def induction_row(task, words, draw):
    """(tokens, {noted place: answer}) as the docstring of the task tells it, from draw() in [0, n)."""
    tokens, noted, followed, successor = [], {}, {}, {}

    def append(word):
        if tokens:
            followed.setdefault(tokens[-1], []).append(word)
        tokens.append(word)

    while len(tokens) < task.length:
        word = words[draw()]
        if tokens and tokens[-1] == word:
            continue
        if task.generator == "paper":
            answer = successor.get(word)
            if answer is None and tokens:
                successor.setdefault(tokens[-1], word)
            append(word)
        else:
            append(word)  # what followed it before is complete
            same = set(followed.get(word, ()))
            answer = same.pop() if len(same) == 1 else None
        if answer is not None:
            noted[len(tokens) - 1] = answer
            append(answer)
        if len(tokens) >= task.length and not noted:
            tokens, noted, followed, successor = [], {}, {}, {}
    return tokens[: task.length], noted


@pytest.mark.parametrize("generator", ["paper", "strict"])
@given(seeds, indices, st.integers(3, 24), st.integers(0, 22), st.integers(0, 30))
def test_induction_by_the_letter(generator, seed, indices, length, fewer, more):
    words = max(2, length - fewer)
    task = tasks.Induction(length, words + more, words, generator, "all")
    examples = task(seed, indices)
    first = tasks.Induction(length, words + more, words, generator)(seed, indices)
    np.testing.assert_array_equal(first.tokens, examples.tokens)
    for row, index in enumerate(indices):
        draws = Draws(seed, "induction", np.array([index]))
        own = draws.choices(words, words + more)[0].tolist()
        assert len(set(own)) == words
        tokens, noted = induction_row(task, own, lambda draws=draws: int(draws.integers(1, words)[0, 0]))
        np.testing.assert_array_equal(examples.tokens[row], tokens)
        np.testing.assert_array_equal(np.flatnonzero(examples.counted[row]), sorted(noted))
        np.testing.assert_array_equal(examples.targets[row], [noted.get(place, 0) for place in range(length)])
        (place,) = np.flatnonzero(first.counted[row])
        assert place == min(noted) and first.targets[row, place] == noted[place]
        assert len({*tokens[:place]}) == place  # the first repetition, so that copying is right
        for place, answer in noted.items():
            earlier = [tokens[i + 1] for i in range(place) if tokens[i] == tokens[place]]
            assert answer in earlier and (generator == "paper" or {answer} == {*earlier})


def test_how_often_copying_is_right():
    """The docstring's 5 % and 13 % of the paper's generator, and no other accuracy of the strict one than 1."""
    for generator, expected in (("paper", (0.95, 0.87)), ("strict", (1, 1))):
        tokens, targets, counted, _ = tasks.Induction(32, 64, 32, generator, "all")(0, np.arange(1500))
        right = []
        for row, place in np.argwhere(counted):
            earlier = np.flatnonzero(tokens[row, :place] == tokens[row, place])
            right.append(tokens[row, earlier[[0, -1]] + 1] == targets[row, place])
        # A row's places are not independent: 5 standard errors as if each row of about 6.5 places were one.
        np.testing.assert_allclose(np.mean(right, axis=0), expected, atol=5 * (0.13 * 0.87 / 1500) ** 0.5)
        assert len(right) > 4 * 1500 and (generator == "paper" or np.all(right))


# Hops.


@given(seeds, indices, st.integers(1, 4), st.integers(0, 3), st.integers(2, 4), st.integers(0, 30))
def test_hop_k_by_the_letter(seed, indices, hops, fewer, symbols, more):
    least = max(0, hops - fewer)
    task = tasks.HopK(length=3 * hops + symbols + more, hops=hops, least=least, symbols=symbols)
    for tokens, targets, counted, real in zip(*task(seed, indices)):
        k, row = int(tokens[0]) - symbols + 1, tokens[1:].tolist()
        assert (least or hops) <= k <= hops and real.all() and max(row) < symbols and counted.any()
        assert not counted[0] and targets[0] == 0
        for i in range(len(row)):
            at = i
            for _ in range(k):
                earlier = [j for j in range(at) if row[j] == row[at]]
                at = earlier[-1] + 1 if earlier else None
                if at is None:
                    break
            assert counted[i + 1] == (at is not None)
            assert targets[i + 1] == (0 if at is None else row[at])


# N-grams.


@given(seeds, indices, st.integers(2, 4), st.integers(0, 12), st.integers(2, 6), st.integers(0, 3), st.data())
def test_ngram_by_the_letter(seed, indices, order, more, vocabulary, table, data):
    contexts = data.draw(st.integers(1, vocabulary ** (order - 1)))
    task = tasks.NGram(order - 1 + more, order, contexts, vocabulary, table)
    known = {tuple(gram[:-1]): gram[-1] for gram in task.grams().tolist()}
    assert len(known) == contexts and max(max(*gram, word) for gram, word in known.items()) < vocabulary
    for tokens, targets, counted, real in zip(*task(seed, indices)):
        assert real.all()
        for place in range(len(tokens)):
            first = place // order * order
            assert counted[place] == (place - first == order - 2)
            if counted[place]:
                assert targets[place] == known[tuple(tokens[first : place + 1].tolist())]
            else:
                assert targets[place] == 0
            if place - first == order - 1:
                assert tokens[place] == targets[place - 1]
    if table:
        assert tasks.NGram(8, 3, 50, 32, table).grams().tolist() != tasks.NGram(8, 3, 50, 32).grams().tolist()


# Recall at a distance.


@given(seeds, indices, st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 10), st.data())
def test_distant_recall_by_the_letter(seed, indices, pairs, fewer, words, more, data):
    queries = max(1, pairs - fewer)
    length = 2 * (pairs + queries + more)
    nearest = data.draw(st.integers(1, length // 2))
    sizes = (length, pairs, queries, pairs + words, pairs + words + 1, 1 + words)
    whole = tasks.DistantRecall(*sizes)(seed, indices)
    task = tasks.DistantRecall(*sizes, nearest=nearest, farthest=length - 2)
    filler = task.keys + task.values
    for tokens, targets, counted, real in zip(*task(seed, indices)):
        begin, found = length - 2 * queries, {}
        places = [place for place in range(0, begin, 2) if tokens[place] < task.keys]
        assert real.all() and len(places) == pairs
        for place in range(begin):
            inside = any(place in (at, at + 1) for at in places)
            assert inside == (tokens[place] < filler) and tokens[place] < task.input_vocabulary
        for at in places:
            assert task.keys <= tokens[at + 1] < filler
            found[int(tokens[at])] = (at, int(tokens[at + 1]))
        assert len({value for _, value in found.values()}) == len(found) == pairs
        for place in range(begin, length, 2):
            at, value = found.pop(int(tokens[place]))  # each is asked for once
            assert tokens[place + 1] == value
            assert counted[place] == (nearest <= place - at) and targets[place] == (value if counted[place] else 0)
        assert counted.any() and not counted[:begin].any() and not counted[begin + 1 :: 2].any()
    assert whole.counted.sum(axis=1).tolist() == [queries] * len(indices)


def test_distant_recalls_places_are_uniform():
    """Key places, asked pairs and fillers: 4,000 rows, five standard deviations."""
    task, rows = tasks.DistantRecall(24, 3, 2, 4, 5, 2), 4000
    tokens = task(0, np.arange(rows)).tokens
    at = np.stack(np.nonzero(tokens[:, :20] < 4), axis=1)
    share = np.bincount(at[:, 1], minlength=20)[::2] / rows
    assert np.abs(share - 3 / 10).max() < 5 * (0.3 * 0.7 / rows) ** 0.5
    place = at[:, 1].reshape(rows, 3)
    asked = (tokens[np.arange(rows)[:, None], place][:, :, None] == tokens[:, None, [20, 22]]).any(axis=2)
    assert np.abs(asked.mean(axis=0) - 2 / 3).max() < 5 * (2 / 9 / rows) ** 0.5  # the first pair as often as the last


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(length=49), r"length=49: must be even and at least 2 \(pairs \+ queries\) = 48"),
        (dict(length=46), r"length=46: must be even and at least 2 \(pairs \+ queries\) = 48"),
        (dict(queries=17), "queries=17: must be at most pairs = 16"),
        (dict(keys=15), "keys=15: must be at least 16"),
        (dict(nearest=60, farthest=50), "farthest=50: no distance from nearest = 60 to it occurs"),
        (dict(nearest=0), "nearest=0: must be at least 1"),
    ],
)
def test_distant_recall_refuses(options, error):
    with pytest.raises(ValueError, match=error):
        tasks.DistantRecall(**options)
