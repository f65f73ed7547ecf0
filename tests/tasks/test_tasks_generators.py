"""Each task against its definition, one example and one token at a time; and what must hold for every setting."""

import itertools

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaformer_jax import tasks
from deltaformer_jax.tasks import word_problem
from deltaformer_jax.tasks.draws import Draws, smallest

seeds = st.one_of(st.integers(0, 2**40), st.sampled_from(["eval", "3 eval"]))
indices = st.lists(st.integers(0, 2**60), min_size=1, max_size=6).map(np.array)


def assert_examples(task, examples, count):
    for array, dtype in zip(examples, (np.int32, np.int32, bool, bool)):
        assert array.shape == (count, task.length) and array.dtype == dtype
    assert examples.tokens.min() >= 0 and examples.tokens.max() < task.input_vocabulary
    assert examples.targets.min() >= 0 and examples.targets.max() < task.target_vocabulary
    assert not examples.targets[~examples.counted].any() and not examples.tokens[~examples.real].any()
    assert not (examples.counted & ~examples.real).any() and examples.counted.any(axis=1).all()


# Draws.


@given(seeds, indices, st.data())
def test_a_row_depends_on_seed_purpose_and_its_own_index_alone(seed, indices, data):
    here = data.draw(st.permutations(range(len(indices))))

    def draw(seed, purpose, indices):
        draws = Draws(seed, purpose, indices)
        return draws.bits(3), draws.integers(5, 1000), draws.uniforms(2), draws.choices(4, 9)

    for whole, some in zip(draw(seed, "a", indices), draw(seed, "a", indices[here])):
        np.testing.assert_array_equal(whole[here], some)
    for other in (draw(seed, "b", indices), draw(f"{seed}x", "a", indices), draw(seed, "a", indices + 1)):
        assert (draw(seed, "a", indices)[0] != other[0]).all()
    draws = Draws(seed, "a", indices)
    assert (draws.bits(3) != draws.bits(3)).all()


def test_draws_are_uniform_and_independent():
    draws = Draws(0, "test", np.arange(4000))
    counts = np.bincount(draws.integers(5, 10).ravel(), minlength=10)
    assert np.sum((counts - 2000.0) ** 2 / 2000.0) < 28  # chi-squared, 9 degrees: p = 0.001
    uniforms = draws.uniforms(4)
    assert 0 < uniforms.min() and uniforms.max() < 1
    # Between places, between neighbouring examples, between calls: 4000 pairs, five standard deviations.
    columns = np.concatenate([uniforms, np.roll(uniforms, 1, axis=0), draws.uniforms(4)], axis=1)
    assert np.abs(np.corrcoef(columns.T) - np.eye(12)).max() < 5 / 4000**0.5
    orders = draws.choices(3, 3) @ (9, 3, 1)
    assert np.abs(np.unique(orders, return_counts=True)[1] - 4000 / 6).max() < 5 * (4000 / 6) ** 0.5
    assert len(np.unique(orders)) == 6


def test_weighted_choices_are_drawn_one_after_another():
    """The probability of each ordered selection is the product of p ∝ the weights that are left."""
    weights, rows = np.array([4.0, 1.0, 2.0, 0.5]), 40_000
    drawn = Draws(1, "test", np.arange(rows)).weighted_choices(2, weights)
    for first, second in itertools.permutations(range(4), 2):
        p = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        found = np.mean((drawn == (first, second)).all(axis=1))
        assert abs(found - p) < 5 * (p * (1 - p) / rows) ** 0.5


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=12, unique=True), st.data())
def test_smallest(numbers, data):
    count = data.draw(st.integers(1, len(numbers)))
    expected = sorted(range(len(numbers)), key=numbers.__getitem__)[:count]
    np.testing.assert_array_equal(smallest(np.array([numbers]), count), [expected])


# Swap tracking.


@given(seeds, indices, st.integers(2, 7), st.integers(1, 20))
def test_swap_tracking(seed, indices, elements, length):
    task = tasks.SwapTracking(length=length, elements=elements)
    examples = task(seed, indices)
    assert_examples(task, examples, len(indices))
    assert examples.counted.all() and task.input_vocabulary == elements * (elements - 1) // 2
    pairs = [(a, b) for a in range(elements) for b in range(a + 1, elements)]
    for tokens, targets in zip(examples.tokens, examples.targets):
        line = list(range(elements))
        for token, target in zip(tokens, targets):
            a, b = pairs[token]
            line[a], line[b] = line[b], line[a]
            assert target == line[0]
        assert sorted(line) == list(range(elements))


@given(seeds, indices, st.integers(1, 12), st.integers(1, 9), st.integers(0, 2))
def test_modular_arithmetic_of_every_prefix(seed, indices, shortest, more, room):
    shape = dict(length=shortest + more + 1 + room, shortest=shortest, longest=shortest + more)
    last, task = tasks.ModularArithmetic(**shape), tasks.ModularArithmetic(**shape, prefixes=True)
    examples = task(seed, indices)
    for name in ("tokens", "real"):
        np.testing.assert_array_equal(getattr(examples, name), getattr(last(seed, indices), name))
    for tokens, targets, counted, _ in zip(*examples):
        size = int(np.argmax(tokens == task.symbols))
        given = tokens[:size].tolist()
        np.testing.assert_array_equal(np.flatnonzero(counted), [*range(0, size, 2), size])
        expected = [modular_value(given[: place + 1]) for place in range(0, size, 2)]
        np.testing.assert_array_equal(targets[counted], [*expected, expected[-1]])
        assert not targets[~counted].any()


# The word problem.


@pytest.mark.parametrize(("group", "order"), [("S3", 6), ("S4", 24), ("S5", 120), ("A3", 3), ("A4", 12), ("A5", 60)])
def test_word_problem(group, order):
    task = tasks.WordProblem(length=9, group=group)
    examples = task(3, np.arange(20))
    assert_examples(task, examples, 20)
    assert task.input_vocabulary == task.target_vocabulary == order and examples.counted.all()
    n = int(group[1])

    def even(permutation):
        return sum(permutation[i] > permutation[j] for i in range(n) for j in range(i + 1, n)) % 2 == 0

    group_elements = [p for p in itertools.permutations(range(n)) if group[0] == "S" or even(p)]
    for tokens, targets in zip(examples.tokens, examples.targets):
        product = tuple(range(n))
        for token, target in zip(tokens, targets):
            product = tuple(product[i] for i in group_elements[token])
            assert group_elements[target] == product


@pytest.mark.parametrize(
    "group, moves, count", [("S5", 2, 11), ("S5", 3, 31), ("S5", 5, 120), ("A5", 3, 21), ("A5", 5, 60), ("S3", 2, 4)]
)
def test_word_problem_of_elements_that_move_few(group, moves, count):
    """1 + C(5,2) swaps, 20 3-cycles; every one of them is drawn, and the targets are products as ever."""
    task = tasks.WordProblem(length=50, group=group, moves=moves)
    tokens, targets, counted, _ = task("seed", np.arange(40))
    permutations = word_problem.elements(group)
    moved = (permutations[tokens] != np.arange(permutations.shape[1])).sum(axis=-1)
    assert len(np.unique(tokens)) == count and moved.max() <= moves and counted.all()
    table = word_problem.products(group)
    np.testing.assert_array_equal(targets[:, 0], tokens[:, 0])
    np.testing.assert_array_equal(targets[:, 1:], table[targets[:, :-1], tokens[:, 1:]])


@given(seeds, indices, st.sampled_from(word_problem.GROUPS), st.integers(1, 12), st.integers(0, 2), st.booleans())
def test_word_problem_by_the_letter(seed, indices, group, elements, pauses, start):
    """Each asked target is the product, composed permutation by permutation, of the elements up to it; all else is not
    asked and holds the empty token or the start."""
    task = tasks.WordProblem(length=start + elements * (1 + pauses), group=group, pauses=pauses, start=start)
    examples = task(seed, indices)
    assert_examples(task, examples, len(indices))
    every, n = word_problem.elements(group).tolist(), int(group[1])
    for tokens, targets, counted, real in zip(*examples):
        product, asked = list(range(n)), []
        for place, token in enumerate(tokens):
            inside = place - start
            if inside < 0:
                assert token == task.input_vocabulary - 1
            elif inside % (1 + pauses):
                assert token == len(every)
            else:
                product = [product[i] for i in every[token]]
            if inside >= 0 and inside % (1 + pauses) == pauses:
                asked.append(place)
                assert every[targets[place]] == product
        np.testing.assert_array_equal(np.flatnonzero(counted), asked)
        assert real.all() and not targets[~counted].any()


@pytest.mark.parametrize("pauses", [1, 3])
def test_word_problem_with_pauses_is_the_one_without_spread_out(pauses):
    close, each = tasks.WordProblem(length=7, group="S4")("seed", np.arange(20)), 1 + pauses
    task = tasks.WordProblem(length=7 * each, group="S4", pauses=pauses)
    tokens, targets, counted, real = task("seed", np.arange(20))
    assert task.input_vocabulary == 25 and task.target_vocabulary == 24 and real.all()
    np.testing.assert_array_equal(tokens[:, ::each], close.tokens)
    assert (np.delete(tokens, np.s_[::each], axis=1) == 24).all()
    np.testing.assert_array_equal(targets[:, pauses::each], close.targets)
    assert (counted == (np.arange(7 * each) % each == pauses)).all()


@pytest.mark.parametrize("pauses", [0, 1])
def test_word_problem_with_a_start_is_the_one_without_behind_one_token(pauses):
    size = 6 * (1 + pauses)
    without = tasks.WordProblem(length=size, group="A4", pauses=pauses)("seed", np.arange(20))
    task = tasks.WordProblem(length=size + 1, group="A4", pauses=pauses, start=True)
    tokens, targets, counted, real = task("seed", np.arange(20))
    assert task.input_vocabulary == 13 + (pauses > 0) and task.target_vocabulary == 12 and real.all()
    assert (tokens[:, 0] == task.input_vocabulary - 1).all() and (tokens[:, 1:] < task.input_vocabulary - 1).all()
    assert not counted[:, 0].any() and not targets[:, 0].any()
    for with_it, alone in zip((tokens, targets, counted), without):
        np.testing.assert_array_equal(with_it[:, 1:], alone)


@pytest.mark.parametrize("length, pauses", [(1, 0), (6, 1)])
def test_word_problem_with_a_start_has_room_for_whole_elements(length, pauses):
    with pytest.raises(
        ValueError, match=f"length={length}: must be a multiple of {1 + pauses}.*one more for the start"
    ):
        tasks.WordProblem(length=length, group="A4", pauses=pauses, start=True)


# MQAR.


def mqar_by_the_rules(tokens, targets, counted, pairs, vocabulary):
    """Reads a row as a person would: what is asked for where, and is the answer right?"""
    memory = {}
    for i in range(pairs):
        key, value = int(tokens[2 * i]), int(tokens[2 * i + 1])
        assert 1 <= key < vocabulary // 2 <= value < vocabulary
        assert key not in memory and value not in memory.values()
        memory[key] = value
    asked = []
    for place in np.flatnonzero(counted):
        assert place >= 2 * pairs and place % 2 == 0
        assert targets[place] == memory[int(tokens[place])]
        asked.append(int(tokens[place]))
    assert sorted(asked) == sorted(memory)


@given(seeds, indices, st.integers(1, 8), st.integers(0, 20), st.integers(0, 40), st.booleans(), st.floats(0.01, 1.0))
def test_mqar(seed, indices, pairs, more_room, more_words, random_filler, power):
    vocabulary, length = 2 * pairs + 2 + more_words, 4 * pairs + 2 * more_room
    task = tasks.MQAR(length, pairs, vocabulary, power, random_filler)
    examples = task(seed, indices)
    assert_examples(task, examples, len(indices))
    assert examples.real.all()
    for tokens, targets, counted in zip(examples.tokens, examples.targets, examples.counted):
        mqar_by_the_rules(tokens, targets, counted, pairs, vocabulary)
        if not random_filler:
            assert np.count_nonzero(tokens) == 3 * pairs


def test_mqar_gaps_follow_the_power_law():
    """One pair: its gap has p ∝ (g + 1)^(a − 1), and every word is filler somewhere."""
    task = tasks.MQAR(length=34, pairs=1, vocabulary=12, power=0.3)
    examples = task(0, np.arange(20_000))
    gaps = (np.argmax(examples.counted, axis=1) - 2) // 2
    p = np.arange(1.0, 17) ** (0.3 - 1)
    p /= p.sum()
    found = np.bincount(gaps, minlength=16) / 20_000
    assert np.all(np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / 20_000))
    assert set(examples.tokens[:, 3::2].ravel()) == set(range(12))


# Reachability.


@given(seeds, indices, st.integers(1, 9), st.sampled_from([0, 40]))
def test_reachability(seed, indices, half, width):
    n = 2 * half
    task = tasks.Reachability(nodes=n, width=width)
    graphs = task(seed, indices)
    assert graphs.rows.shape == (len(indices), n, width or n + 1) and graphs.rows.dtype == np.float32
    assert graphs.targets.dtype == np.int32 and graphs.counted.all()
    for rows, targets, parents in zip(graphs.rows, graphs.targets, graphs.parents):
        expected = np.zeros_like(rows)
        expected[0, n] = 1
        roots, root_of = [], {}
        for t in range(n):
            expected[t, t] = expected[t, parents[t]] = 1
            if parents[t] == t:
                roots.append(t)
            assert parents[t] <= t
            root_of[t] = t if parents[t] == t else root_of[parents[t]]
        np.testing.assert_array_equal(rows, expected)
        assert len(roots) == 2 and roots[0] == 0
        np.testing.assert_array_equal(targets, [root_of[t] == 0 for t in range(n)])
        assert targets.sum() == half


def test_parents_are_uniform_among_earlier_nodes_of_the_tree():
    """Three nodes a tree: the last one's parent is either of the other two, as often."""
    graphs = tasks.Reachability(nodes=6)(0, np.arange(4000))
    first = [np.flatnonzero(targets) for targets in graphs.targets]
    chosen = np.mean([parents[a[2]] == a[0] for parents, a in zip(graphs.parents, first)])
    assert abs(chosen - 0.5) < 5 * 0.5 / 4000**0.5
    # The first tree is node 0's and any two of the other five nodes.
    assert len({tuple(a) for a in first}) == 10


# Formal languages.


def modular_value(symbols):
    return eval("".join("01234+-*"[s] for s in symbols)) % 5


def final_stack(symbols):
    stack = []
    for symbol in symbols:
        if symbol == 2:
            stack = stack[:-1]
        else:
            stack.append({0: 0, 1: 1, 3: 0, 4: 1}[symbol])
    return [*reversed(stack), 2]


LANGUAGES = {
    tasks.ModularArithmetic: (lambda x: [modular_value(x)], lambda n: 1),
    tasks.Parity: (lambda x: [x.count(1) % 2], lambda n: 1),
    tasks.ReverseString: (lambda x: x[::-1], lambda n: n),
    tasks.DuplicateString: (lambda x: x + x, lambda n: 2 * n),
    tasks.OddsFirst: (lambda x: x[1::2] + x[::2], lambda n: n),
    tasks.StackManipulation: (final_stack, lambda n: n + 1),
}


@pytest.mark.parametrize("kind", LANGUAGES, ids=lambda kind: kind.__name__)
@given(seeds, indices, st.integers(1, 25), st.integers(0, 15), st.integers(0, 3))
def test_formal_languages(kind, seed, indices, shortest, more, room):
    answer, answer_length = LANGUAGES[kind]
    longest = shortest + more
    if kind is tasks.ModularArithmetic and shortest == longest and longest % 2 == 0:
        longest += 1
    task = kind(length=longest + answer_length(longest) + room, shortest=shortest, longest=longest)
    examples = task(seed, indices)
    assert_examples(task, examples, len(indices))
    empty = task.symbols
    for tokens, targets, counted, real in zip(*examples):
        size = int(np.argmax(tokens == empty))
        given = tokens[:size].tolist()
        assert shortest <= size <= longest and empty not in given
        total = size + answer_length(size)
        np.testing.assert_array_equal(real, np.arange(task.length) < total)
        assert (tokens[size:total] == empty).all()
        expected = answer(given)
        np.testing.assert_array_equal(np.flatnonzero(counted), size + np.arange(len(expected)))
        np.testing.assert_array_equal(targets[counted], expected)
        if kind is tasks.ModularArithmetic:
            assert size % 2 == 1 and max(given[::2]) < 5 and all(s >= 5 for s in given[1::2])
        elif kind is not tasks.StackManipulation:
            assert max(given) < 2
        else:
            first = next((i for i, s in enumerate(given) if s >= 2), size)
            assert first >= 1 and all(s >= 2 for s in given[first:]) and (size == 1 or first < size)


@pytest.mark.parametrize("kind", LANGUAGES, ids=lambda kind: kind.__name__)
@given(seeds, indices, st.booleans())
def test_a_start_comes_before_the_same_examples(kind, seed, indices, prefixes):
    more = {"prefixes": prefixes} if kind is tasks.ModularArithmetic else {}
    without = kind(length=20, longest=6, **more)
    task = kind(length=21, longest=6, start=True, **more)
    examples = task(seed, indices)
    assert_examples(task, examples, len(indices))
    assert task.input_vocabulary == without.input_vocabulary + 1 and task.target_vocabulary == without.target_vocabulary
    for name, first in dict(tokens=without.input_vocabulary, targets=0, counted=False, real=True).items():
        np.testing.assert_array_equal(getattr(examples, name)[:, 0], first)
        np.testing.assert_array_equal(getattr(examples, name)[:, 1:], getattr(without(seed, indices), name))


@pytest.mark.parametrize("kind", LANGUAGES, ids=lambda kind: kind.__name__)
def test_lengths_and_symbols_are_uniform(kind):
    task = kind(length=33, shortest=1, longest=10)
    examples = task(0, np.arange(6000))
    sizes = np.argmax(examples.tokens == task.symbols, axis=1)
    counts = np.bincount(sizes, minlength=11)
    every = range(1, 10, 2) if kind is tasks.ModularArithmetic else range(1, 11)
    assert np.flatnonzero(counts).tolist() == list(every)
    assert np.abs(counts[list(every)] - 6000 / len(every)).max() < 5 * (6000 / len(every)) ** 0.5
    assert set(examples.tokens.ravel()) == set(range(task.input_vocabulary))


def test_pop_on_an_empty_stack_does_nothing():
    task = tasks.StackManipulation(length=15, longest=7)
    inputs = np.array([[1, 2, 2, 2, 3, 4, 2], [0, 1, 0, 2, 2, 2, 2]])
    answers, sizes = task.solve(inputs, np.array([7, 7]))
    assert answers[0, : sizes[0]].tolist() == [0, 2] and answers[1, : sizes[1]].tolist() == [2]


# Keys, and Theorem 1.


@pytest.mark.parametrize("width", [2, 4, 8, 16, 32, 64, 128])
def test_near_orthogonal_keys(width):
    m = width.bit_length() - 1
    keys = tasks.near_orthogonal_keys(min(width + width**2, 6 * width), width)
    np.testing.assert_allclose(np.sum(keys**2, axis=1), 1, rtol=1e-14)
    assert tasks.coherence(keys[: 2 * width]) == pytest.approx(width**-0.5, rel=1e-12)
    bound = (2 / width) ** 0.5 if m % 2 else 2 * width**-0.5
    if len(keys) > 2 * width:
        assert tasks.coherence(keys) == pytest.approx(bound, rel=1e-12)
    np.testing.assert_array_equal(keys[:width], np.eye(width))
    np.testing.assert_array_equal(keys[: width + 3], tasks.near_orthogonal_keys(width + 3, width))


def test_keys_of_a_hundred_bases():
    """512 keys in 128 dimensions and far more: pairs of the last bases are as nearly orthogonal as the first."""
    keys = tasks.near_orthogonal_keys(128 + 128 * 128, 128)
    assert tasks.coherence(np.concatenate([keys[:256], keys[-512:]])) == pytest.approx(0.125)


@given(seeds, indices, st.integers(2, 6), st.integers(0, 9))
def test_swap_construction(seed, indices, slots, swaps):
    keys = tasks.near_orthogonal_keys(slots, 4)
    first = np.arange(2.0 * slots).reshape(slots, 2)
    memory = tasks.SwapConstruction(keys, first, swaps)(seed, indices)
    for row in range(len(indices)):
        contents = [*first]
        for i in range(slots):
            np.testing.assert_array_equal(memory.keys[row, i], keys[i])
            np.testing.assert_array_equal(memory.values[row, i], first[i])
        for t, (a, b) in enumerate(memory.pairs[row], slots):
            assert a != b
            contents[a], contents[b] = contents[b], contents[a]
            np.testing.assert_array_equal(memory.keys[row, t], keys[a] - keys[b])
        np.testing.assert_array_equal(memory.keys[row, slots + swaps :], keys)
        assert not memory.values[row, slots:].any()
        assert memory.gate[row].tolist() == [1.0] * (slots + swaps) + [0.0] * slots
        np.testing.assert_array_equal(memory.expected[row], contents)


# What all of them share.

EVERY = [
    tasks.SwapTracking(),
    tasks.WordProblem(),
    tasks.MQAR(),
    tasks.Induction(length=12),
    tasks.HopK(length=24, hops=3, least=1),
    tasks.NGram(length=11),
    tasks.Reachability(),
    *(kind(length=120) for kind in LANGUAGES),
    tasks.SwapConstruction(np.eye(4), np.eye(4), 5),
]


@pytest.mark.parametrize("task", EVERY, ids=lambda task: type(task).__name__)
@settings(max_examples=8)
@given(seeds, indices)
def test_an_example_is_a_function_of_seed_and_index(task, seed, indices):
    together = task(seed, indices)
    for i, index in enumerate(indices):
        for whole, alone in zip(together, task(seed, np.array([index]))):
            np.testing.assert_array_equal(whole[i], alone[0])
    other = task(f"{seed}!", np.arange(40))
    assert any((a != b).any() for a, b in zip(task(seed, np.arange(40)), other))


@pytest.mark.parametrize("task", EVERY, ids=lambda task: type(task).__name__)
def test_grain_reads_it(task):
    source = tasks.TaskSource(task, 5, 12)
    assert len(source) == 12 and "seed=5" in repr(source)
    with pytest.raises(IndexError):
        source[12]
    expected = task(5, np.arange(12))
    batches = list(grain.MapDataset.source(source).batch(4))
    for i, batch in enumerate(batches):
        for name, array in expected._asdict().items():
            np.testing.assert_array_equal(batch[name], array[4 * i : 4 * i + 4])
    assert len(batches) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.SwapTracking(elements=1), "elements=1: must be at least 2"),
        (lambda: tasks.SwapTracking(length=0), "length=0: must be at least 1"),
        (lambda: tasks.WordProblem(group="D5"), "group='D5': must be one of S3"),
        (lambda: tasks.WordProblem(group="S4", moves=5), "moves=5: must be from 2 to 4 in S4, or 0"),
        (lambda: tasks.WordProblem(group="A5", moves=2), "moves=2: must be from 3 to 5 in A5, or 0"),
        (lambda: tasks.WordProblem(length=16, pauses=2), "length=16: must be a multiple of 3, an element and its"),
        (lambda: tasks.WordProblem(pauses=-1), "pauses=-1: must be at least 0"),
        (lambda: tasks.MQAR(length=63), "length=63: must be even and at least 4 pairs = 16"),
        (lambda: tasks.MQAR(length=16, pairs=5), "length=16: .*4 pairs = 20"),
        (lambda: tasks.MQAR(vocabulary=9), "vocabulary=9: must be at least 2 pairs \\+ 2 = 10"),
        (lambda: tasks.MQAR(power=0.0), "power=0.0"),
        (lambda: tasks.MQAR(pairs=0), "pairs=0"),
        (lambda: tasks.HopK(length=6), "length=6: must be at least 7"),
        (lambda: tasks.HopK(least=5), "least=5: must be at most hops = 4, or 0 to take that"),
        (lambda: tasks.NGram(contexts=1025), r"contexts=1025: must be at most vocabulary\^\(order − 1\) = 1024"),
        (lambda: tasks.NGram(order=6), "vocabulary=32: must be at most 2"),
        (lambda: tasks.Induction(length=2), "length=2: must be at least 3"),
        (lambda: tasks.Induction(words=65), "words=65: must be from 2 to 64, the smaller of the length and the voc"),
        (lambda: tasks.Induction(words=1), "words=1: must be from 2"),
        (lambda: tasks.Induction(generator="own"), "generator='own': must be 'paper' or 'strict'"),
        (lambda: tasks.Induction(score="last"), "score='last': must be 'first' or 'all'"),
        (lambda: tasks.Reachability(nodes=7), "nodes=7: must be even"),
        (lambda: tasks.Reachability(nodes=8, width=8), "width=8: must be at least nodes \\+ 1 = 9"),
        (lambda: tasks.Parity(length=40), "length=40: must be at least 41"),
        (lambda: tasks.DuplicateString(length=100), "length=100: must be at least 120"),
        (lambda: tasks.Parity(shortest=5, longest=4), "longest=4: must be at least 5"),
        (lambda: tasks.ModularArithmetic(shortest=4, longest=4), "no odd length"),
        (lambda: tasks.Parity(length=11, longest=10, start=True), "length=11: must be at least 12.*and the start"),
        (lambda: tasks.near_orthogonal_keys(5, 12), "width=12: must be a power of two"),
        (lambda: tasks.near_orthogonal_keys(5, 0), "width=0: must be a power of two"),
        (lambda: tasks.SwapTracking(elements=2.5), "elements=2.5: must be an integer"),
        (lambda: tasks.near_orthogonal_keys(21, 4), "count=21: must be 1 to"),
        (lambda: tasks.SwapConstruction(np.eye(3), np.eye(4), 1), "values have shape"),
        (lambda: tasks.SwapConstruction(np.eye(1), np.eye(1), 1), "keys have shape"),
        (lambda: tasks.SwapConstruction(np.eye(3), np.eye(3), -1), "swaps=-1"),
        (lambda: tasks.TaskSource(tasks.Parity(), 0, 0), "examples=0"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("task:swaps", "no task 'swaps'; did you mean swap\\?"),
        ("task:", "no task ''; there are: swap, mqar"),
        ("task:mqar,pair=3", "mqar has no option 'pair'; did you mean pairs\\?"),
        ("task:swap,zzz=3", "swap has no option 'zzz'; there are: elements"),
        ("task:mqar,pairs=x", "pairs=x: must be a whole number"),
        ("task:mqar,power=x", "power=x: must be a number"),
        ("task:mqar,random_filler=1", "random_filler=1: must be true or false"),
        ("task:mqar,pairs", "option pairs has no value"),
        ("task:mqar,pairs=3,pairs=4", "pairs is given twice"),
        ("task:swap,length=3", "length is data.sequence_length"),
        ("task:parity", "data.sequence_length=16: must be at least 41"),
        ("task:swap,elements=1", "elements=1: must be at least 2"),
    ],
)
def test_errors_of_a_spec_are_one_line(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        tasks.make_task(spec, 16)
    assert spec in str(error.value) and "\n" not in str(error.value)


def test_specs():
    made = tasks.make_task("task:mqar, pairs=8,random_filler=False,power=0.5", 128)
    assert made == tasks.MQAR(128, 8, random_filler=False, power=0.5)
    assert tasks.make_task("task:word_problem,group=A5", 7) == tasks.WordProblem(7, "A5")
    for name, kind in tasks.TOKEN_TASKS.items():
        assert tasks.make_task(f"task:{name}", 128) == kind(length=128)
