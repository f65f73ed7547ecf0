"""Bad batches: one is skipped, several in a row are gone back from, and the run ends as if it had never seen them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import training_cases as cases

from deltaformer_jax.config import MeshConfig, OptimizerConfig
from deltaformer_jax.data import load_corpus
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training import guard, step
from deltaformer_jax.training.loop import RunError
from deltaformer_jax.training.position import Feed, Position


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("corpus"))


def fingerprint(tokens):
    """A number that tells batches apart, in NumPy and under jit alike."""
    weights = np.arange(1, tokens.size + 1, dtype=np.uint32).reshape(tokens.shape)
    return (tokens.astype(np.uint32) * weights).sum(dtype=np.uint32)


@pytest.fixture
def poison(monkeypatch, corpus):
    """poison({number: factor}) multiplies the loss and the gradient of those batches."""
    original = step.loss_and_gradient

    def spoil(factors):
        marks = {}
        feed = Feed(cases.small_config(corpus), load_corpus(corpus), make_mesh(MeshConfig(), jax.devices()[:1]))
        for number, batch in feed.stream(Position()):
            if number in factors:
                marks[int(fingerprint(batch["tokens"]))] = factors[number]
            if number == max(factors):
                break
        assert len(marks) == len(factors)

        def poisoned(parts, params, batch, *rest, **pieces):
            loss, gradient, metrics = original(parts, params, batch, *rest, **pieces)
            factor, found = jnp.float32(1), fingerprint(batch["tokens"])
            for mark, value in marks.items():
                factor = jnp.where(found == np.uint32(mark), jnp.float32(value), factor)
            return loss * factor, jax.tree.map(lambda g: g * factor, gradient), metrics

        monkeypatch.setattr(step, "loss_and_gradient", poisoned)

    return spoil


def losses(workdir):
    """The training lines: step, loss, gradient, learning rate."""
    return [record for record in cases.read_metrics(workdir) if "loss" in record]


def skipped(workdir):
    return [record["skipped_batch"] for record in cases.read_metrics(workdir) if "skipped_batch" in record]


@pytest.mark.parametrize(
    ("number", "factor"),
    [
        pytest.param(0, np.nan, marks=pytest.mark.rare),
        pytest.param(2, np.nan, marks=pytest.mark.rare),
        (10, np.nan),
        pytest.param(5, np.inf, marks=pytest.mark.long),
    ],
    ids=["first", "early", "late", "inf"],
)
def test_one_bad_batch_is_one_skipped_step(corpus, poison, tmp_path, number, factor):
    poison({number: factor})
    run = cases.run_training(cases.small_config(corpus), tmp_path / "poisoned")
    assert skipped(tmp_path / "poisoned") == [number] and run.step == 12 and run.passed == ()
    assert int(run.state.guard.skipped) == 1 and int(run.state.guard.made) == 11
    clean = cases.run_training(cases.small_config(corpus, run__steps=11), tmp_path / "clean", passed=[number])
    cases.assert_same_bits(run.state._replace(step=0, guard=0), clean.state._replace(step=0, guard=0))
    numbers = lambda records: [(record["loss"], record["learning_rate"]) for record in records]
    assert numbers(losses(tmp_path / "poisoned")) == numbers(losses(tmp_path / "clean"))


def test_a_gradient_50_deviations_out_is_one_skipped_step(corpus, poison, tmp_path):
    config = cases.small_config(corpus, run__steps=26, run__eval_every=0, run__checkpoint_every=0)
    calm = cases.run_training(config, tmp_path / "calm")
    norms = np.array([record["grad_norm"] for record in losses(tmp_path / "calm")])
    assert not skipped(tmp_path / "calm") and int(calm.state.guard.skipped) == 0
    mean, deviation = norms[:23].mean(), norms[:23].std()
    poison({23: (mean + 50 * deviation) / norms[23]})
    run = cases.run_training(config, tmp_path / "spike")
    assert skipped(tmp_path / "spike") == [23] and int(run.state.guard.skipped) == 1


@pytest.mark.parametrize(
    "numbers",
    [
        (5, 6, 7),
        pytest.param((0, 1, 2), marks=pytest.mark.long),
        pytest.param((9, 10, 11), marks=pytest.mark.rare),
    ],
    ids=["middle", "before any checkpoint", "end"],
)
def test_several_in_a_row_are_gone_back_from(corpus, poison, tmp_path, numbers):
    poison(dict.fromkeys(numbers, np.nan))
    run = cases.run_training(cases.small_config(corpus), tmp_path / "poisoned")
    assert run.step == 12 and run.passed == numbers and run.next_batch == 15
    clean = cases.run_training(cases.small_config(corpus), tmp_path / "clean", passed=numbers)
    cases.assert_same_bits(run.state, clean.state)
    here = cases.read_metrics(tmp_path / "poisoned")
    assert [record for record in here if "passed_batches" not in record] == cases.read_metrics(tmp_path / "clean")
    assert sum("passed_batches" in record for record in here) == 1


@pytest.mark.parametrize(
    "name", ["muon", *(pytest.param(name, marks=pytest.mark.rare) for name in ("lion", "adafactor"))]
)
def test_each_update_goes_back(corpus, poison, tmp_path, name):
    """Parameters and what the update keeps of them come from the checkpoint."""
    poison(dict.fromkeys((5, 6, 7), np.nan))
    config = cases.small_config(corpus, optimizer__name=name)
    run = cases.run_training(config, tmp_path / "poisoned")
    assert run.step == 12 and run.passed == (5, 6, 7)
    cases.assert_same_bits(run.state, cases.run_training(config, tmp_path / "clean", passed=(5, 6, 7)).state)


@pytest.mark.long
@pytest.mark.parametrize("at", [pytest.param(6, marks=pytest.mark.rare), 7, pytest.param(10, marks=pytest.mark.long)])
def test_stopped_among_bad_batches_and_resumed(corpus, poison, tmp_path, at):
    """Stopped after one or two of three bad batches, or after going back: the same as never stopped."""
    poison(dict.fromkeys((5, 6, 7), np.nan))
    whole = cases.run_training(cases.small_config(corpus), tmp_path / "whole")
    cases.run_training(cases.small_config(corpus), tmp_path / "run", stop=lambda steps: cases.StopAt(steps, at))
    run = cases.run_training(cases.small_config(corpus), tmp_path / "run")
    assert run.passed == whole.passed == (5, 6, 7)
    cases.assert_same_bits(run.state, whole.state)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_run_that_cannot_get_past_says_so(corpus, poison, tmp_path):
    poison(dict.fromkeys(range(5, 30), np.nan))
    with pytest.raises(RunError, match=r"loss nan, gradient nan, and again after going back 3 times.*learning_rate"):
        cases.run_training(cases.small_config(corpus), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def judge(values, deviations=20.0):
    """Whether each of these norms in turn is made into a step, and the guard at the end."""
    state, made = guard.new_guard("deviations"), []
    for norm in values:
        ok = guard.good(state, jnp.float32(1), jnp.float32(norm), OptimizerConfig(skip_deviations=deviations))
        state, made = guard.after(state, ok, jnp.float32(norm)), [*made, bool(ok)]
    return made, state


def test_the_guard_by_hand():
    calm = list(1 + 0.1 * np.random.default_rng(0).standard_normal(100))
    made, state = judge([*calm[:60], np.nan, 6.0, *calm[60:]])
    assert made == [True] * 60 + [False] * 2 + [True] * 40
    without = judge(calm)[1]
    np.testing.assert_array_equal(state.mean, without.mean)  # what was skipped left no trace
    np.testing.assert_array_equal(state.variance, without.variance)
    assert 0.9 < state.mean < 1.1 and 0.07 < np.sqrt(state.variance) < 0.13
    assert int(state.skipped) == 2 and int(state.in_a_row) == 0
    assert judge([*calm[:60], 6.0], deviations=0.0)[0][-1]  # 0: whatever is finite
    assert judge([1.0] * 60 + [1.9])[0][-1] and not judge([1.0] * 60 + [2.1])[0][-1]  # norms that never varied
    assert all(judge([100.0 / (1 + i) for i in range(60)])[0])  # a fall from a high start
    assert int(judge([1.0] * 30 + [np.nan] * 3)[1].in_a_row) == 3


def test_the_rule_by_ratio():
    """Decisions by hand: 100 norms of 1, so that the bound is 1.2 · 1 + 0.1 = 1.3."""
    settings = OptimizerConfig(skip="ratio")
    norms = [50.0] * 3 + [1.0] * 100 + [1.29, 1.4, 1.4, 1.4, 1.29, np.nan, np.nan, 1.4, 9.0]
    # The first 100 are made whatever they are; of two high ones in a row the second is made, and raises the mean.
    expected = [True] * 103 + [True, False, True, False, True, False, False, True, False]

    def decide(state, norm):
        ok = guard.good(state, jnp.float32(1), norm, settings)
        return guard.after(state, ok, norm), ok

    state, made = jax.lax.scan(decide, guard.new_guard("ratio"), jnp.asarray(norms, jnp.float32))
    assert made.tolist() == expected
    assert (int(state.made), int(state.skipped), int(state.in_a_row)) == (sum(expected), len(norms) - sum(expected), 1)
    recent = [norm for norm, ok in zip(norms, expected) if ok][-100:]
    assert sorted(np.asarray(state.recent).tolist()) == sorted(np.float32(recent).tolist())
    assert not hasattr(guard.new_guard("deviations"), "recent")  # a checkpoint of the usual rule is what it was


def test_a_run_by_the_ratio_resumes_bit_for_bit(corpus, tmp_path):
    config = cases.small_config(corpus, optimizer__skip="ratio", run__steps=6, run__eval_every=0)
    whole = cases.run_training(config, tmp_path / "whole")
    cases.run_training(config, tmp_path / "parts", stop=lambda steps: cases.StopAt(steps, 3))
    again = cases.run_training(config, tmp_path / "parts")
    cases.assert_same_bits(again.state, whole.state)
    assert np.count_nonzero(again.state.guard.recent) == 6
