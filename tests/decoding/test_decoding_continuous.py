"""Continuous batching: every prompt gets the text that it gets alone, whoever its neighbours are."""

import jax
import numpy as np
import pytest
from flax import nnx

from deltaformer_jax import LanguageModel, ModelConfig, decoding
from deltaformer_jax.config import Mixer
from deltaformer_jax.data import ByteTokenizer, train_bpe
from deltaformer_jax.decoding import continuous
from deltaformer_jax.decoding.generate import generate_batch
from deltaformer_jax.decoding.requests import check_sampling, make_requests

BYTES = ByteTokenizer()
SIZES = dict(vocab_size=257, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)
# Layers of every kind of cache: keys and u, a ring shorter than the texts with a shift, a state with convolutions.
MIXERS = (Mixer("delta_former", kv_shift=True), Mixer("softmax_attention", window=8), "gated_delta_net")


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(mixers=MIXERS, num_layers=3, implementation="recurrent", **SIZES)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    # At its initial values a model repeats its last token: louder weights give texts that depend on the prompt.
    return jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, model)


@pytest.fixture(scope="module")
def prompts():
    draw = np.random.default_rng(0)
    return [[256, *draw.integers(0, 256, length).tolist()] for length in (3, 0, 14, 7, 10, 1, 15, 5, 12)]


LIMITS = [26, 20, 1, 18, 13, 22, 12, 20, 19]  # with their prompts, 17 to 32 tokens: one capacity


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.2, "top_k": 50, "top_p": 0.9}])
def test_a_refilled_batch_gives_every_prompt_its_text(model, prompts, options):
    seeds = list(range(100, 109))
    texts = decoding.generate(model, prompts, max_tokens=LIMITS, seed=seeds, batch_size=3, **options)
    assert [len(text.tokens) for text in texts] == LIMITS
    assert {text.finish for text in texts} == {"length"} and texts[0].text == ""
    assert len({tuple(text.tokens) for text in texts}) == len(texts)
    for i, text in enumerate(texts):
        alone = decoding.generate(model, [prompts[i]], max_tokens=LIMITS[i], seed=[seeds[i]], **options)
        assert alone == [text]
    turned = decoding.generate(model, prompts[::-1], max_tokens=LIMITS[::-1], seed=seeds[::-1], batch_size=3, **options)
    assert [text.tokens for text in turned[::-1]] == [text.tokens for text in texts]


def test_one_seed_for_all_is_one_stream_per_row(model, prompts):
    same = decoding.generate(model, [prompts[0]] * 4, max_tokens=8, seed=5, batch_size=2)
    assert len({tuple(text.tokens) for text in same}) > 1
    given = decoding.generate(model, [prompts[0]] * 4, max_tokens=8, seed=[5, 5, 6, 5], batch_size=2)
    assert given[0] == given[1] == given[3] != given[2]
    # It is the stream that `generate_batch` draws from, too.
    in_step = np.stack(list(generate_batch(model, [prompts[0]] * 4, 8, seed=5)), axis=1)
    assert in_step.tolist() == [text.tokens for text in same]


def test_logprobs_are_those_of_the_whole_forward_pass(model, prompts):
    texts = decoding.generate(model, prompts, max_tokens=LIMITS, temperature=1.0, logprobs=True, batch_size=3)
    padded, real = np.zeros((2, len(prompts), 32), np.int32)
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        ids = [*prompt, *text.tokens]
        padded[i, : len(ids)], real[i, : len(ids)] = ids, 1
    expected = np.asarray(jax.nn.log_softmax(model(padded, segment_ids=real)[0]))
    for i, (prompt, text) in enumerate(zip(prompts, texts)):
        places = np.arange(len(prompt) - 1, len(prompt) + len(text.tokens) - 1)
        np.testing.assert_allclose(text.logprobs, expected[i, places, text.tokens], atol=2e-5)
    assert decoding.generate(model, prompts[:1], max_tokens=2)[0].logprobs is None


class Says:
    """In place of a model's draws: row b says the tokens of `texts[b]`, which it finds by its seed."""

    def __init__(self, monkeypatch, texts):
        table = np.zeros((len(texts), max(map(len, texts))), np.int32)
        for row, text in zip(table, texts):
            row[: len(text)] = list(text)

        def draw(logits, keys, temperature, top_p, top_k, logprobs):
            return jax.numpy.asarray(table)[keys[0], keys[1]], None

        monkeypatch.setattr(continuous, "_draw", draw)
        monkeypatch.setattr(continuous, "_keys", lambda seed, stream, drawn: (seed.astype(int), drawn))
        for function in (continuous._admit, continuous._advance):
            function.clear_cache()


@pytest.fixture
def says(monkeypatch):
    yield lambda *texts: Says(monkeypatch, texts)
    for function in (continuous._admit, continuous._advance):
        function.clear_cache()


def test_a_stop_string_across_tokens(model, says):
    """The text ends before it, its row is refilled, and what could have begun one comes when it did not."""
    says(b"one\n\ntwo", b"a\nb\n\n", b"\n" * 9, b"four and more")
    pieces = list(
        decoding.stream(model, [""] * 4, max_tokens=8, tokenizer=BYTES, stop=["\n\n"], seed=[0, 1, 2, 3], batch_size=2)
    )
    by_row = [[piece for piece in pieces if piece.row == row] for row in range(4)]
    assert ["".join(piece.text for piece in row) for row in by_row] == ["one", "a\nb", "", "four and"]
    assert [row[-1].finish for row in by_row] == ["stop", "stop", "stop", "length"]
    assert [len(row) for row in by_row] == [5, 5, 2, 8]
    assert [piece.text for piece in by_row[1]] == ["a", "", "\nb", "", ""]
    assert all(piece.finish is None for row in by_row for piece in row[:-1])


def test_a_stop_string_inside_and_across_the_tokens_of_bpe(model, says):
    bpe = train_bpe(["the cat. the dog. " * 50], 280)
    text = "the dog. the cat. the"
    ids = bpe.encode(text)
    assert len(ids) < len(text) / 2
    model = LanguageModel(ModelConfig(num_layers=1, **{**SIZES, "vocab_size": 280}), rngs=nnx.Rngs(0))
    says(ids)
    (found,) = decoding.generate(model, ["x"], max_tokens=len(ids), tokenizer=bpe, stop=["og. the c"])
    assert found.text == "the d" and found.finish == "stop" and found.tokens == ids[: len(found.tokens)]


def test_whole_characters_and_the_ends_of_texts(model, says):
    cut = "né".encode() + "日".encode()[:2]
    says([*"é日".encode(), 256, 5, 5, 5], cut, [*b"ab", 7, 5, 5, 5], [256])
    pieces = list(
        decoding.stream(
            model, ["", "x", "", ""], max_tokens=5, tokenizer=BYTES, stop_tokens=[7], seed=[0, 1, 2, 3], batch_size=3
        )
    )
    by_row = [[piece for piece in pieces if piece.row == row] for row in range(4)]
    assert [piece.text for piece in by_row[0]] == ["", "é", "", "", "日"]
    assert [piece.text for piece in by_row[1]] == ["n", "", "é", "", "\ufffd"]
    assert [piece.text for piece in by_row[2]] == ["a", "b", ""]
    assert [row[-1].finish for row in by_row] == ["length", "length", "stop", "end_of_text"]
    assert by_row[3][-1].text == ""
    imported = ByteTokenizer()
    imported.ends |= {7}  # as eos_token_id of a folder says
    (ended,) = decoding.generate(model, [""], max_tokens=5, tokenizer=imported, seed=[2])
    assert (ended.text, ended.tokens, ended.finish) == ("ab", [97, 98, 7], "end_of_text")
    without = decoding.generate(model, [[256]], max_tokens=5, stop_tokens=[7], seed=[2])
    assert without[0].tokens == [97, 98, 7] and without[0].finish == "stop"


def test_rows_stay_full_and_few_programs_are_compiled(model, monkeypatch):
    """40 texts of 1 to 20 tokens in 8 rows: the steps are near their least, and lengths alone compile nothing."""
    rows = []
    advance = continuous._Batch.advance

    def counted(batch):
        rows.append(sum(request is not None for request in batch._in_row))
        advance(batch)

    monkeypatch.setattr(continuous._Batch, "advance", counted)
    draw = np.random.default_rng(1)
    prompts = [[256] * int(n) for n in draw.integers(1, 20, 40)]
    limits = draw.integers(1, 21, 40).tolist()
    texts = decoding.generate(model, prompts, max_tokens=limits, batch_size=8)
    assert [len(text.tokens) for text in texts] == limits
    # Every step has all rows at work while prompts wait.
    assert all(n == 8 for n in rows[:-20]) and len(rows) < sum(limits) / 8 + 20
    before = continuous._advance._cache_size(), continuous._admit._cache_size()
    decoding.generate(model, prompts[::-1], max_tokens=limits, batch_size=8)
    assert continuous._advance._cache_size() == before[0]
    assert continuous._admit._cache_size() <= before[1] + 2  # groups of other sizes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens = 0: give 1 or more"),
        ({"max_tokens": [1, 2]}, ValueError, "max_tokens has 2 numbers for 1 prompts"),
        ({"seed": -1}, ValueError, "seed = -1"),
        ({"seed": [1, 2]}, ValueError, "seed has 2 numbers for 1 prompts"),
        ({"temperature": -1.0}, ValueError, "temperature = -1.0"),
        ({"top_p": 0.0}, ValueError, "top_p = 0.0"),
        ({"batch_size": 0}, ValueError, "batch_size = 0"),
        ({"stop": ["x"]}, ValueError, "strings need the tokenizer"),
        ({"stop": "x", "tokenizer": BYTES}, TypeError, "stop is one text"),
        ({"stop": None}, TypeError, "stop = None: give a list of texts, or leave it out"),
        ({"stop": [3], "tokenizer": BYTES}, TypeError, "stop has 3: give texts; ids of tokens belong into stop_tokens"),
        ({"stop_tokens": None}, TypeError, "stop_tokens = None: give a list of ids, or leave it out"),
        ({"stop_tokens": 5}, TypeError, "stop_tokens = 5: give a list of ids, or leave it out"),
        ({"stop_tokens": [1.5]}, TypeError, r"stop_tokens\[0\] = 1\.5: give a whole number, an id from 0 to 256"),
        ({"prompts": None}, TypeError, "prompts = None: give a list of prompts"),
        ({"prompts": 3}, TypeError, "prompts = 3: give a list of prompts"),
        ({"prompts": [None]}, TypeError, r"prompts\[0\] must be a list of integers; it is None"),
        ({"prompts": [1, 2]}, TypeError, r"prompts\[0\] must be a list of integers; it is 1"),
        ({"prompts": [[1], [[1], [1, 2]]]}, TypeError, r"prompts\[1\] = .*: give a list of integers"),
        ({"prompts": [[1.0]]}, TypeError, r"prompts\[0\] must be a list of integers; it is float64\[1\]"),
        ({"top_k": 2.5}, TypeError, r"top_k = 2\.5: give a whole number, 0 \(all tokens\) or more"),
        ({"top_k": None}, TypeError, "top_k = None: give a whole number"),
        ({"top_k": True}, TypeError, "top_k = True: give a whole number"),
        ({"top_p": "0.9"}, TypeError, r"top_p = '0\.9': give a number, a probability"),
        ({"temperature": None}, TypeError, "temperature = None: give a number, 0"),
        ({"temperature": float("nan")}, ValueError, "temperature = nan: give 0"),
        ({"seed": 1.5}, TypeError, r"seed = 1\.5: give a whole number, 0 to 2\^32 - 1"),
        ({"seed": ["a"]}, TypeError, r"seed\[0\] = 'a': give a whole number"),
        ({"max_tokens": None}, TypeError, "max_tokens = None: give a whole number, 1 or more"),
        ({"max_tokens": [2.5]}, TypeError, r"max_tokens\[0\] = 2\.5: give a whole number, 1 or more"),
        ({"batch_size": 2.5}, TypeError, r"batch_size = 2\.5: give a whole number, 1 or more"),
        ({"tokenizer": "bytes"}, TypeError, "tokenizer = 'bytes': give one of deltaformer_jax.data"),
        ({"stop": [""], "tokenizer": BYTES}, ValueError, "stop: an empty text"),
        ({"stop_tokens": [257]}, ValueError, r"stop_tokens\[0\] = 257: give an id from 0 to 256"),
        ({"prompts": ["a"]}, ValueError, r"prompts\[0\] is text: give tokenizer="),
        ({"prompts": "a", "tokenizer": BYTES}, TypeError, "prompts is one text"),
        ({"prompts": [[]]}, ValueError, "prompt: has no token"),
        ({"prompts": {"a": 1}}, TypeError, "prompts is a dict, {'a': 1}: give a list of prompts"),
        ({"logprobs": "yes"}, TypeError, "logprobs = 'yes': give True or False"),
        ({"logprobs": 5}, TypeError, "logprobs = 5: give True or False"),
        ({"max_tokens": 10**9}, ValueError, r"max_tokens = 1000000000: the caches of 1 rows of 1,073,741,824 tokens"),
        ({"prompts": [[300]]}, ValueError, r"prompts\[0\] has the id 300"),
    ],
)
def test_errors_come_at_the_call(model, options, error, message):
    options = {"prompts": [[1]], "max_tokens": 3, **options}
    prompts = options.pop("prompts")
    for call in (decoding.stream, decoding.generate):
        with pytest.raises(error, match=message) as caught:
            call(model, prompts, **options)
        assert "\n" not in str(caught.value)


def test_errors_of_prompts_in_step_and_of_the_model(model):
    with pytest.raises(TypeError, match="prompts = None: give a list of lists of token ids"):
        generate_batch(model, None, 3)
    with pytest.raises(TypeError, match=r"tokens = 2\.5: give a whole number, 1 or more"):
        generate_batch(model, [[1]], 2.5)
    with pytest.raises(
        ValueError, match=r"tokens = 1000000000: the caches of 2 rows of .* GiB, there are .* give fewer"
    ):
        generate_batch(model, [[1], [2]], 10**9)
    for call in (lambda: decoding.stream(None, [[1]], max_tokens=1), lambda: generate_batch("x", [[1]], 1)):
        with pytest.raises(TypeError, match=r"model is a .*: give a LanguageModel"):
            call()


def test_arrays_are_numbers_and_lists_too(prompts):
    options = dict(vocabulary=257, tokenizer=None, stop=(), stop_tokens=np.array([3]))
    given = (np.array(prompt) for prompt in prompts[:2])
    found = make_requests(given, max_tokens=np.array([3, 4]), seed=np.uint32(7), **options)
    assert [request.ids.tolist() for request in found] == prompts[:2]
    assert [(r.max_tokens, r.seed, r.stream) for r in found] == [(3, 7, 0), (4, 7, 1)]
    assert make_requests(prompts[:1], max_tokens=np.int64(3), seed=jax.numpy.array([5]), **options)[0].seed == 5
    check_sampling(1, np.float32(0.5), np.int8(5), jax.numpy.float32(1), np.uint32(7))


def test_no_prompts_are_no_texts(model):
    assert decoding.generate(model, [], max_tokens=3) == []
