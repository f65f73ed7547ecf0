"""Tasks of lm-evaluation-harness: the scores that its own class for transformers gives to the same weights.

tests/fixtures/harness/record.json has what lm-eval, transformers and torch answered for tests/fixtures/harness/model
(record.py there), once as they do by default, once with end-of-text before every context, and by default for a
tokenizer that begins texts with a token (with_bos.py there). These tests ask `Answers` the same, without lm-eval, which
brings some fifty packages. The adapter is tested over the few names that it imports, and over the harness itself where
it is there.
"""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from support.programs.fake_lm_eval import KINDS, adapter_over

from deltaformer_jax import LanguageModel, Mixer, ModelConfig
from deltaformer_jax.data import ByteTokenizer, load_tokenizer, pretrained_tokenizer
from deltaformer_jax.decoding.choose import power_of_two
from deltaformer_jax.evaluate.harness.answers import Answers
from deltaformer_jax.evaluate.harness.score import packed, score
from deltaformer_jax.evaluate.harness.windows import Window, encode_pair, last_window, rolling_windows
from deltaformer_jax.interop import load_pretrained

HARNESS = Path(__file__).parents[1] / "fixtures" / "harness"
RECORD = json.loads((HARNESS / "record.json").read_text(encoding="utf-8"))
BYTES = ByteTokenizer()
_spec = importlib.util.spec_from_file_location("with_bos", HARNESS / "with_bos.py")
with_bos = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(with_bos)


@pytest.fixture(scope="module")
def parts():
    return load_pretrained(HARNESS / "model")[0], load_tokenizer(HARNESS / "model" / "tokenizer.json")


@pytest.fixture(scope="module")
def parts_with_bos(tmp_path_factory):
    folder = with_bos.with_bos(tmp_path_factory.mktemp("bos") / "model")
    return load_pretrained(folder)[0], pretrained_tokenizer(folder)


@pytest.fixture(params=["plain", "separated", "bos"])
def case(request, parts, parts_with_bos):
    """(our answers, the record of the same)"""
    separator, chosen = request.param != "plain", parts_with_bos if request.param == "bos" else parts
    return Answers(*chosen, length=RECORD["length"], batch_size=8, separator=separator), RECORD[request.param]


def asked(record, task):
    return [example["arguments"] for example in record["answers"][task]], [
        example["answer"][0] for example in record["answers"][task]
    ]


def test_loglikelihoods_are_the_harnesss(case):
    answers, record = case
    arguments, expected = asked(record, "offline_choice")
    with jax.default_matmul_precision("highest"):
        found = answers.loglikelihood(arguments)
    np.testing.assert_allclose([x for x, _ in found], [float(x) for x, _ in expected], rtol=0, atol=5e-5)
    assert [greedy for _, greedy in found] == [str(greedy) == "True" for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}
    # Its accuracy: of each four choices the likeliest is the right one.
    scores = np.array([x for x, _ in found]).reshape(-1, 4)
    right = [example["answer"] for example in examples("offline_choice")]
    assert np.mean(scores.argmax(axis=1) == right) == record["metrics"]["offline_choice"]["acc"]


def test_rolling_loglikelihoods_are_the_harnesss(case):
    """Most of the texts are longer than the model's 64 tokens."""
    answers, record = case
    arguments, expected = asked(record, "offline_texts")
    texts = [text for (text,) in arguments]
    assert sum(len(answers.tokenizer.encode(text)) > RECORD["length"] for text in texts) >= 3
    with jax.default_matmul_precision("highest"):
        found = answers.loglikelihood_rolling(texts)
    np.testing.assert_allclose(found, [float(x) for x in expected], rtol=2e-7, atol=5e-5)
    bits = -sum(found) / sum(len(text.encode()) for text in texts) / np.log(2)
    assert abs(bits - record["metrics"]["offline_texts"]["bits_per_byte"]) < 5e-5


def test_generated_texts_are_the_harnesss(case):
    """Among them some that a stop string ends, and some whose context loses its beginning."""
    answers, record = case
    arguments, expected = asked(record, "offline_copy")
    with jax.default_matmul_precision("highest"):
        found = answers.generate_until(arguments)
    assert found == expected
    lengths = [len(answers.tokenizer.encode(text)) for text in expected]
    assert min(lengths) < 16 == arguments[0][1]["max_gen_toks"]
    right = [example["answer"] for example in examples("offline_copy")]
    matches = np.mean([text.strip() == answer for text, answer in zip(found, right)])
    assert matches == record["metrics"]["offline_copy"]["exact_match"]


def test_packed_windows_score_as_they_do_alone(monkeypatch):
    """Several windows share a row, in a model with layers of every kind of memory; each sees no other."""
    mixers = (Mixer("delta_former", kv_shift=True), Mixer("softmax_attention", window=8), "gated_delta_net")
    sizes = dict(vocab_size=257, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)
    model = LanguageModel(
        ModelConfig(mixers=mixers, num_layers=3, implementation="recurrent", **sizes), rngs=nnx.Rngs(0)
    )
    draw = np.random.default_rng(0)
    windows = [Window(draw.integers(0, 257, n).tolist(), int(draw.integers(1, n))) for n in (3, 20, 2, 9, 15, 12)]
    monkeypatch.setattr("deltaformer_jax.evaluate.harness.score.ROW", 64)
    (whole,) = packed([len(window.tokens) - 1 for window in windows], 2)
    assert whole == (64, [[1, 4, 5, 3, 0, 2]])
    together = score(model, windows, batch_size=1)
    alone = [score(model, [window], batch_size=1)[0] for window in windows]
    # 20 numbers in float32, each off by some units in the last place of a log-probability of about 6.
    np.testing.assert_allclose([x for x, _ in together], [x for x, _ in alone], rtol=2e-6, atol=2e-5)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_packing_places_each_window_once(batch_size):
    sizes = np.random.default_rng(1).integers(1, 700, 200).tolist()
    batches = list(packed(sizes, batch_size))
    rows = [(width, row) for width, group in batches for row in group]
    assert sorted(i for _, row in rows for i in row) == list(range(200))
    assert all(row and sum(sizes[i] for i in row) <= width for width, row in rows)
    assert all(len(group) <= batch_size for _, group in batches)
    assert [width for width, _ in batches] == sorted((width for width, _ in batches), reverse=True)
    # No row has room for the shortest window of a later batch, so that rows are nearly full.
    assert sum(width for width, _ in rows) < 1.2 * sum(sizes) < sum(power_of_two(size) for size in sizes)
    assert list(packed([], 2)) == []


def examples(task):
    from deltaformer_jax.evaluate import harness

    file = Path(harness.__file__).parent / "own_tasks" / f"{task}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_adapter_answers_what_the_harness_asks(case, capsys):
    """Over the few names that it imports of lm_eval: the record's requests in, the record's answers out."""
    answers, record = case
    with jax.default_matmul_precision("highest"), adapter_over(record) as (adapter, calls, told):
        manager = adapter.task_manager(["mine"])
        found = adapter.run_tasks(answers, list(KINDS), manager, num_fewshot=2, limit=9)
        with pytest.raises(ValueError, match=r"--tasks ofline_copy: no such task; .*did you mean offline_copy"):
            adapter.check_tasks(manager, ["offline_copy", "ofline_copy"])
    assert found == {task: record["metrics"][task] for task in KINDS}
    assert manager.include_path == [str(adapter.OWN_TASKS), "mine"] and capsys.readouterr().out == ""
    asked_with = {"task_manager": manager, "num_fewshot": 2, "limit": 9, "log_samples": False, "bootstrap_iters": 0}
    assert calls == [{"tasks": list(KINDS), **asked_with}]
    expected = asked(record, "offline_choice")[1]
    np.testing.assert_allclose(
        [x for x, _ in told["offline_choice"]], [float(x) for x, _ in expected], rtol=0, atol=5e-5
    )
    assert [greedy for _, greedy in told["offline_choice"]] == [str(greedy) == "True" for _, greedy in expected]
    expected = [float(x) for x in asked(record, "offline_texts")[1]]
    np.testing.assert_allclose(told["offline_texts"], expected, rtol=2e-7, atol=5e-5)
    assert told["offline_copy"] == asked(record, "offline_copy")[1]


def test_the_adapter_gives_the_installed_harness_the_same(parts):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    from deltaformer_jax.evaluate.harness.adapter import check_tasks, run_tasks, task_manager

    manager = task_manager()
    names = ["offline_choice", "offline_copy", "offline_texts"]
    answers = Answers(*parts, length=RECORD["length"], separator=False)
    found = run_tasks(answers, names, manager)
    for task, metrics in RECORD["plain"]["metrics"].items():
        for metric, value in metrics.items():
            assert found[task][metric] == pytest.approx(value, abs=5e-5, rel=1e-6), (task, metric)
    with pytest.raises(ValueError, match="--tasks ofline_copy: no such task"):
        check_tasks(manager, ["offline_copy", "ofline_copy"])


def test_a_pair_is_the_whole_text():
    encode = BYTES.encode
    before, after = encode_pair("two words  ", "and more", encode, [256], 256)
    assert (bytes(before[1:]), bytes(after), before[0]) == (b"two words", b"  and more", 256)
    assert encode_pair("", "x", encode, [], 256) == ([256], [120])
    assert encode_pair("  ", "x", encode, [], 256) == ([256], [32, 32, 120])
    with pytest.raises(ValueError, match="the continuation '' has no token"):
        encode_pair("x", "", encode, [], 256)


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11])
def test_rolling_windows_predict_each_token_once(count):
    tokens = list(range(count))
    windows = list(rolling_windows(tokens, 99, 4))
    assert [token for window in windows for token in window.tokens[-window.scored :]] == tokens
    assert all(len(window.tokens) - 1 <= 4 for window in windows) and windows[0].tokens[0] == 99
    # As in the docstring of lm_eval.api.model.LM.loglikelihood_rolling.
    assert list(rolling_windows(list(range(10)), 99, 4)) == [
        Window([99, 0, 1, 2, 3], 4),
        Window([3, 4, 5, 6, 7], 4),
        Window([5, 6, 7, 8, 9], 2),
    ]
    assert list(rolling_windows([], 99, 4)) == []


def test_a_long_context_loses_its_beginning():
    assert last_window([1, 2, 3, 4], [5, 6], 4) == Window([2, 3, 4, 5, 6], 2)
    assert last_window([1], [2, 3, 4, 5], 4) == Window([1, 2, 3, 4, 5], 4)
    with pytest.raises(ValueError, match="a continuation has 5 tokens, the model reads 4"):
        last_window([1], [2, 3, 4, 5, 6], 4)


def test_errors_of_generation(parts):
    answers = Answers(*parts, length=64)
    with pytest.raises(ValueError, match="max_gen_toks = 64: the model reads 64 tokens"):
        answers.generate_until([("x", {"until": "\n", "max_gen_toks": 64})])
    with pytest.raises(ValueError, match=r"generation options \['num_beams'\]: not known here"):
        answers.generate_until([("x", {"num_beams": 4, "max_gen_toks": 2})])
    with pytest.raises(ValueError, match="length = 0"):
        Answers(*parts, length=0)
