"""Layers that were trained with a window, first tokens and separators, in caches that hold no more than they see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltaformer_jax import LanguageModel, ModelConfig, decoding
from deltaformer_jax.config import Mixer
from deltaformer_jax.data import ByteTokenizer
from deltaformer_jax.decoding import Evicted, Streaming
from deltaformer_jax.decoding.chosen.layers import Slots, behind_windows, chooses, empty_cache, resolved, seen_after
from deltaformer_jax.decoding.continuous import _slots
from deltaformer_jax.decoding.requests import make_requests

SEPARATORS = (3, 4, 5)
SEES = dict(window=4, initial_tokens=1, separator_tokens=SEPARATORS)
SIZES = dict(d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16, vocab_size=40, implementation="recurrent")
# A full layer, two with separators, a state, and one that sees a window alone, by a ring.
HYBRID = (
    Mixer("softmax_attention", window=0),
    Mixer("delta_former", kv_shift=True, conv_size=3),
    Mixer("softmax_attention", forget_gate=True),
    "gated_delta_net",
    Mixer("delta_former", initial_tokens=0, separator_tokens=()),
)
OWN = ("delta_former", Mixer("softmax_attention", initial_tokens=0, window=3))
RULE = Streaming(1, 8, 4, 16)


def model_of(mixers, **fields):
    model = LanguageModel(
        ModelConfig(mixers=mixers, num_layers=len(mixers), **SEES, **SIZES, **fields), rngs=nnx.Rngs(0)
    )
    model = jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, model)  # louder: texts that depend on the prompt
    if chooses(model)[0]:  # the full layer adds nothing, so that what it drops changes nothing
        kernel = model.blocks[0].mixer.output
        kernel[...] = jnp.zeros_like(kernel[...])
    return model


@pytest.fixture(scope="module")
def prompts():
    """Of 3, 50 and 14 tokens, with three separators in the longer ones."""
    draw = np.random.default_rng(0)
    found = [draw.integers(6, 40, length) for length in (3, 50, 14)]
    found[1][[2, 20, 45]] = found[2][[0, 5, 6]] = SEPARATORS
    return [prompt.tolist() for prompt in found]


def asked(model, prompts, cache=None, **others):
    others = dict(max_tokens=20, seed=list(range(len(prompts))), batch_size=3, top_k=5, logprobs=True) | others
    return decoding.generate(model, prompts, cache=cache, **others)


def assert_those_of_the_whole_text(model, prompts, texts):
    """Every token's log-probability is that of one call with prompt and text, without a cache."""
    rows = [prompt + text.tokens for prompt, text in zip(prompts, texts)]
    tokens, real = np.zeros((2, len(rows), 80), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)], real[row, : len(ids)] = ids, 1
    logits = np.asarray(jax.nn.log_softmax(model(tokens, segment_ids=real)[0]))
    for row, (prompt, text) in enumerate(zip(prompts, texts)):
        expected = logits[row, np.arange(len(prompt), len(rows[row])) - 1, text.tokens]
        np.testing.assert_allclose(text.logprobs, expected, rtol=1e-4, atol=2e-5)  # float32, other shapes


def in_text(model, prompts, texts):
    """The most separators in a text."""
    return max(np.isin(prompt + text.tokens, SEPARATORS).sum() for prompt, text in zip(prompts, texts))


@pytest.mark.long
def test_texts_of_a_hybrid_are_those_of_the_whole_text(prompts):
    """Its prompts are longer and shorter than a cache, and its rows of different lengths. Without a rule, too, layers
    with separators keep of a prompt what they see of it."""
    model = model_of(HYBRID)
    assert behind_windows(model) == [False, True, True, False, False]
    for rule in (None, Streaming(1, 12, 4, 20, characters=(9,)), Evicted(0.2, proxy=4)):
        texts = asked(model, prompts, rule)
        assert in_text(model, prompts, texts) <= 12
        assert_those_of_the_whole_text(model, prompts, texts)


def test_texts_of_a_model_whose_layers_all_have_windows(prompts):
    """Without rotations, places in the cache are as good as positions in the text."""
    model = model_of(OWN, rope_base=None)
    texts = asked(model, prompts, Streaming(1, 12, 4, 20))
    assert 3 <= in_text(model, prompts, texts) <= 12
    assert_those_of_the_whole_text(model, prompts, texts)
    assert_those_of_the_whole_text(model, prompts, asked(model, prompts, Streaming(1, 12, 4, 20, all_places=True)))
    fewer = Streaming(1, 0, 4, 6)
    found = asked(model, prompts, fewer)
    assert [text.tokens for text in found] != [text.tokens for text in texts]
    turned = asked(model, prompts[::-1], fewer, seed=[2, 1, 0])[::-1]  # the neighbours and rows do not matter
    assert [text.tokens for text in found] == [text.tokens for text in turned]


def cache_bytes(model, slots, rule=None):
    leaves = jax.tree.leaves(jax.eval_shape(lambda: empty_cache(model, 2, slots, rule)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_memory_of_the_caches():
    """Of 1,000 tokens in two rows: a slot has a key and a value of 8 numbers and, of chosen tokens, 5 bytes more."""
    model = model_of(HYBRID)
    prompt = [[7] * 900 + [3] * 20]
    requests = make_requests(prompt, 40, max_tokens=80, seed=0, tokenizer=None, stop=(), stop_tokens=())
    assert seen_after(model, prompt) == [1 + 20]  # the last three are separators
    of = functools.partial(_slots, model, requests)
    sizes = dict(whole=Slots(1024, 1024, 1024), usual=of(None), kept=of(Evicted(0.05)), streaming=of(RULE))
    assert sizes["usual"] == Slots(1024, 1024, 128)
    assert sizes["kept"] == Slots(1024, 128, 128)  # 46 and 21 of the prompt, and 80 more, to a power of two
    assert sizes["streaming"] == Slots(1024, 16, 16)
    assert _slots(model_of(HYBRID[-1:]), requests, None) == Slots(1024, 1024, 1024)
    rules = dict(kept=Evicted(0.05), streaming=RULE)
    found = {name: cache_bytes(model, slots, rules.get(name)) for name, slots in sizes.items()}
    slot, place, rows = 2 * 8 * 4, 4 + 1, 2
    decays = 2 * 4  # of the forgetting gate, two heads
    drops = 3 * slot + decays + 2 * place  # of one token, in the layers that are not bounded by themselves
    less = lambda name: found["whole"] - found[name]
    assert less("usual") == rows * (1024 - 128) * (drops - slot)
    assert less("kept") == rows * ((1024 - 128) * drops - 128 * place)
    assert less("streaming") == rows * ((1024 - 16) * drops - 16 * place)


def test_refusals():
    own, hybrid = model_of(OWN), model_of(HYBRID)
    plain = model_of(
        (Mixer("softmax_attention", window=0), Mixer("delta_former", initial_tokens=0, separator_tokens=()))
    )
    fits = functools.partial(resolved, tokenizer=ByteTokenizer(), vocabulary=40)
    for rule, model, message in [
        (Streaming(0, 8, 4, 16), own, "cache: initial = 0: a layer of this model sees more, initial_tokens = 1; give"),
        (
            Streaming(1, 8, 3, 16),
            own,
            "cache: window = 3: a layer of this model sees more, window = 4; give at least 4",
        ),
        (Streaming(1, 8, 3, 16, characters=(9,)), hybrid, "cache: window = 3: a layer of this model sees more"),
        (Streaming(1, 8, 4, 16, characters="."), own, "separators: all layers of this model have their own"),
        (Streaming(1, 8, 4, 16, fold=True), own, "cache: fold: every layer of this model has a window"),
        (Streaming(1, 8, 4, 16, characters=(9,), all_places=True), plain, "all_places: no layer of this model has"),
        (Evicted(0.5), own, "no layer of this model has a cache that grows with the text"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            fits(rule, model)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="cache: all_places = 1: give True or False"):
        Streaming(1, 8, 4, 16, all_places=1)
    assert fits(RULE, own).characters == ()
