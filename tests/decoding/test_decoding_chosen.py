"""Streaming caches and evictions of trained models: against their definitions, token by token, and in `generate`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltaformer_jax import LanguageModel, ModelConfig, decoding, ops
from deltaformer_jax.config import Mixer
from deltaformer_jax.data import ByteTokenizer
from deltaformer_jax.decoding import Evicted, Streaming
from deltaformer_jax.decoding.chosen.eviction import read_and_evict
from deltaformer_jax.decoding.chosen.layers import Slots, empty_cache, resolved
from deltaformer_jax.decoding.chosen.rules import separator_ids
from deltaformer_jax.decoding.chosen.streaming import compacted, entries, marked, read_in_pieces
from deltaformer_jax.layers import DeltaFormer, SoftmaxAttention
from deltaformer_jax.layers.caches import is_selected

SIZES = dict(vocab_size=257, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=32)
# One cache that drops entries, of a layer with tails, and one that does not: a ring that counts on in the text.
MIXERS = (Mixer("delta_former", kv_shift=True, conv_size=3), Mixer("softmax_attention", window=8))
SEPARATORS = tuple(range(60))
RULE = Streaming(1, 2, 4, 12, characters=SEPARATORS)


@pytest.fixture(scope="module")
def model():
    model = LanguageModel(
        ModelConfig(mixers=MIXERS, num_layers=4, implementation="recurrent", **SIZES), rngs=nnx.Rngs(0)
    )
    return jax.tree.map(lambda x: x * 3 if x.ndim > 2 else x, model)  # louder: texts that depend on the prompt


@pytest.fixture(scope="module")
def prompts():
    draw = np.random.default_rng(0)
    return [[256, *draw.integers(0, 256, length).tolist()] for length in (3, 40, 14)]


LAYERS = {
    "softmax, a part rotated, yarn": (
        SoftmaxAttention,
        dict(rotary_fraction=0.5, rope_scaling="yarn:2,16", qk_norm=True),
    ),
    "delta, two keys": (DeltaFormer, dict(write_rope_base=50.0, write_similarity="linear")),
    "delta, no rotation of the write": (DeltaFormer, dict(write_rope_base=None, num_heads=1)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_streaming_is_its_definition_in_float64(x64, name):
    """A layer that streams 30 tokens against the rule's words: keys that are not rotated in a list, turned anew by
    their places at each token."""
    kind, options = LAYERS[name]
    sizes = dict(num_heads=2, num_kv_heads=1, head_dim=8, rope_base=100.0) | options
    mixer = kind(12, **sizes, dtype=jnp.float64, rngs=nnx.Rngs(0))
    mixer = jax.tree.map(lambda x: x.astype(jnp.float64) * 2, mixer)
    rng = np.random.default_rng(0)
    x, separator = jnp.asarray(rng.standard_normal((1, 30, 12))), rng.random(30) < 0.4
    rule = dict(initial=1, separators=2, window=3, capacity=9)

    @jax.jit
    def stream(mixer, x, lasting):
        def token(cache, now):
            keep = ops.streaming_entries(cache.memory, **rule)
            memory = mixer.in_places(ops.compact_cache(cache.memory, keep))
            y, cache = mixer(now[0], cache=type(cache)(memory, cache.tail))
            return type(cache)(ops.newest_lasting(cache.memory, now[1]), cache.tail), y[0, 0]

        empty = mixer.init_cache(1, 9)
        kind = ops.SelectedKVCache if isinstance(mixer, SoftmaxAttention) else ops.SelectedKUCache
        cache = type(empty)(kind.of(empty.memory), empty.tail)
        return jax.lax.scan(token, cache, (x[0][:, None, None], lasting[:, None, None]))[1]

    found = np.asarray(stream(mixer, x, jnp.asarray(separator)))
    expected = by_hand(mixer, x, separator, **rule)
    # Each key is turned several times, and a cosine in float64 is right to 2e-16.
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)


def by_hand(mixer, x, separator, initial, separators, window, capacity):
    query, key, value, *_ = mixer.inputs(x, positions=jnp.zeros((1, x.shape[1]), jnp.int32), turned=False)
    turned = lambda y, places, base: (
        y if base is None else mixer.inputs.rotated(y[None], jnp.asarray(places, jnp.int32)[None], base)[0]
    )
    delta = isinstance(mixer, DeltaFormer)
    beta = np.asarray(mixer._beta(x)[0, :, 0]) if delta else None
    u, held, out = np.zeros((x.shape[1], 8)), [], []
    softmax = lambda scores: np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    base = mixer.inputs.rope_base
    for t in range(x.shape[1]):
        if len(held) == capacity:
            between = [i for n, i in enumerate(held) if n >= initial and n < len(held) - window and separator[i]]
            ends = [i for n, i in enumerate(held) if n < initial or n >= len(held) - window]
            held = sorted(ends + between[-separators:])
        held = [*held, t]
        places, last = range(len(held)), [len(held) - 1]
        rotated = lambda base, at=(tuple(held), places): np.asarray(turned(key[0, np.array(at[0])], at[1], base))[:, 0]
        u[t] = np.asarray(value)[0, t, 0]
        if delta and len(held) > 1:
            one = lambda y: y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + 1e-6) if mixer.unit_keys else y
            scores = one(rotated(mixer.write_base)) @ one(rotated(mixer.write_base))[-1] * mixer.write_scale
            weights = softmax(scores[:-1]) if mixer.write_similarity.normalised else scores[:-1]
            u[t] -= beta[t] * weights @ u[held[:-1]]
        asked = np.asarray(turned(query[0, t : t + 1], last, base))[0]
        keys = rotated(base)
        if delta and mixer.unit_keys:
            keys = keys / np.sqrt(np.mean(keys * keys, axis=-1, keepdims=True) + 1e-6)
        read = softmax(asked @ keys.T * 8**-0.5) @ u[held]
        out.append(np.einsum("hk,hkd->d", read, np.asarray(mixer.output[...])))
    return np.stack(out)


def test_a_prompt_in_pieces_is_read_as_token_by_token(model):
    """Rows of 40 and 23 tokens, padded on the right; the caches hold the same, the ring and the state among them."""
    rng = np.random.default_rng(2)
    tokens, lengths = jnp.asarray(rng.integers(0, 256, (2, 40)), jnp.int32), np.array([40, 23])
    real = jnp.asarray(np.arange(40) < lengths[:, None], jnp.int32)
    last, whole = jax.jit(
        lambda model: read_in_pieces(model, tokens, real, empty_cache(model, 2, Slots.of(RULE, 64), RULE), RULE)
    )(model)

    @jax.jit
    def one_by_one(model):
        def token(caches, now):
            given, real = (x[:, None] for x in now)
            caches = compacted(model, caches, RULE)
            hidden, caches = model.hidden(given, segment_ids=real, cache=caches)
            return marked(model, caches, given, real, RULE), (hidden[:, 0], entries(model, caches))

        return jax.lax.scan(token, empty_cache(model, 2, Slots.of(RULE, 64), RULE), (tokens.T, real.T))

    caches, (hidden, held) = one_by_one(model)
    assert held.max() == RULE.capacity and held[-1, 0] < held.max()
    expected = np.asarray(hidden)[lengths - 1, np.arange(2)]
    np.testing.assert_allclose(last, expected, rtol=2e-4, atol=2e-4)
    for cache, other in zip(whole, caches):
        if is_selected(cache):
            np.testing.assert_array_equal(cache.memory.lasting, other.memory.lasting)
            np.testing.assert_array_equal(cache.length, other.length)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), cache, other)
    assert whole[0].memory.capacity == RULE.capacity


@pytest.fixture(scope="module")
def asked(model):
    return functools.partial(decoding.generate, model, max_tokens=20, seed=[1, 1, 1], batch_size=3, logprobs=True)


@pytest.fixture(scope="module")
def usual(asked, prompts):
    return asked(prompts)


def test_streaming_texts(asked, usual, prompts):
    """Before the cache is full they are those without one; afterwards each is its prompt's own, whoever its neighbours
    are."""
    wide = asked(prompts, cache=Streaming(1, 2, 4, 64, characters=SEPARATORS))
    for text, other in zip(usual, wide):
        assert text.tokens == other.tokens  # to rounding: a prompt is read in pieces
        np.testing.assert_allclose(text.logprobs, other.logprobs, rtol=1e-4, atol=1e-5)
    narrow = asked(prompts, cache=RULE)
    assert all(text.tokens != other.tokens for text, other in zip(narrow, usual))
    assert [text.tokens for text in asked(prompts[::-1], cache=RULE)[::-1]] == [text.tokens for text in narrow]


def test_evicted_texts(asked, usual, prompts):
    """keep = 1 is the usual text bit for bit; a seed gives one choice, whoever the neighbours are; a short prompt
    stays whole."""
    assert asked(prompts, cache=Evicted(1.0)) == usual
    rule = Evicted(0.3, proxy=4, random=0.15, write_weight=0.5)
    found = asked(prompts, cache=rule)
    assert found[0].tokens == usual[0].tokens and found[1].tokens != usual[1].tokens
    assert asked(prompts[2:], cache=rule, seed=[1])[0].tokens == found[2].tokens  # alone, its prompt is not padded


@pytest.mark.parametrize("by_head", [False, True])
def test_an_eviction_keeps_what_the_proxies_read(model, by_head):
    """Each layer's choice, or each key head's, by the queries of the whole prompt; what stays, stays as it was, with
    its position."""
    rng, rule = np.random.default_rng(5), Evicted(0.4, proxy=3, write_weight=2.0, by_head=by_head)
    groups = 1
    if by_head:
        sizes = SIZES | dict(num_heads=4, num_kv_heads=2, head_dim=4)
        config = ModelConfig(mixers=MIXERS, num_layers=4, implementation="recurrent", **sizes)
        model, groups = jax.tree.map(lambda x: x * 2, LanguageModel(config, rngs=nnx.Rngs(0))), 2
    tokens, lengths = jnp.asarray(rng.integers(0, 256, (2, 30)), jnp.int32), np.array([30, 17])
    real = jnp.asarray(np.arange(30) < lengths[:, None], jnp.int32)
    counts = np.array([rule.counts(int(length)) for length in lengths], np.int32).T
    assert counts.tolist() == [[12, 7], [0, 0]]

    @jax.jit
    def both(model):
        keys = jax.random.split(jax.random.key(0), 2)
        evicted = read_and_evict(model, tokens, real, Slots.of(None, 20), rule, counts, keys)[1]
        _, streams = model.look(tokens, lambda before, after, real: before, segment_ids=real)
        block = jax.tree.map(lambda x: x[1], model.blocks[0])  # layer 2, of the second period
        places = jnp.tile(jnp.arange(30, dtype=jnp.int32), (2, 1))
        compared = block.mixer.compared(block.mixer_norm(streams[2]), segment_ids=real, positions=places)
        more = model.hidden(tokens[:, :1], cache=evicted)[1]  # a token after the eviction
        return evicted, compared, model.hidden(tokens, segment_ids=real, cache=model.init_cache(2, 30))[1], more

    evicted, compared, whole, more = both(model)
    empty = jax.eval_shape(lambda: empty_cache(model, 2, Slots.of(rule, 20), rule))
    chex.assert_trees_all_equal_shapes(evicted, empty, more)
    chosen = []
    for row, head in np.ndindex(2, groups):
        length = lengths[row]
        scores = np.zeros(length)
        for kind, weight in (("read", 1.0), ("write", 2.0)):
            query, key = (np.asarray(compared[kind][name], np.float64)[row] for name in ("query", "key"))
            query, key = np.split(query, groups, axis=1)[head], key[:, head]
            for t in range(length - 3, length):
                seen = t + (kind == "read")
                weights = np.exp(query[t] @ key[:seen].T)
                scores[:seen] += weight * (weights / weights.sum(axis=1, keepdims=True)).sum(axis=0)
        best = np.argsort(-scores[:-3], kind="stable")[: counts[0, row] - 3]
        expected = sorted([*best, *range(length - 3, length)])
        memory, before = (jax.tree.map(lambda x, row=row: np.asarray(x)[1, row], c[0].memory) for c in (evicted, whole))
        position = memory.position.reshape(20, groups)[:, head]
        np.testing.assert_array_equal(position[: len(expected)], expected)
        assert np.all(position[len(expected) :] == -1) and memory.length == length
        kept = memory.key[: len(expected), head]
        np.testing.assert_allclose(kept, before.key[expected, head], rtol=1e-5, atol=1e-5)
        after = np.asarray(more[0].memory.position)[1, row].reshape(20, groups)[:, head]
        np.testing.assert_array_equal(after[: len(expected) + 1], [*expected, length])
        chosen.append(expected)
    assert not by_head or chosen[0] != chosen[1]


def test_separators_of_tokenizers():
    assert sorted(separator_ids(ByteTokenizer())) == sorted(b"\n.;:")
    assert separator_ids(ByteTokenizer(), "é.") == (ord("."),)  # a byte of é is no separator
    with pytest.raises(ValueError, match="the tokenizer has no token that consists of 'é' only"):
        separator_ids(ByteTokenizer(), "é")


def test_refusals(model):
    state_only = LanguageModel(ModelConfig(mixers=("gated_delta_net",), num_layers=1, **SIZES), rngs=nnx.Rngs(0))
    linear, biased = (
        nnx.eval_shape(lambda config=config: LanguageModel(config, rngs=nnx.Rngs(0)))
        for config in (
            ModelConfig(mixers=(Mixer("delta_former", **own),), num_layers=1, **SIZES)
            for own in (dict(read_similarity="linear"), dict(position_bias="kerple", position_bias_in="write"))
        )
    )
    fits = functools.partial(resolved, tokenizer=ByteTokenizer(), vocabulary=257)
    assert [fits(Evicted(1.0), each) for each in (linear, biased, state_only)] == [None] * 3  # nothing is dropped
    for bad, message in [
        (lambda: Streaming(4, 64, 256, 324), "capacity = 324: give more than initial . separators . window = 324"),
        (lambda: Streaming(-1, 64, 256, 800), "cache: initial = -1: give 0 or more"),
        (lambda: Streaming(1, 64, 0, 800), "cache: window = 0: give 1 or more"),
        (lambda: Evicted(0.0), "keep = 0.0: give a share above 0, at most 1"),
        (lambda: Evicted(1.5), "keep = 1.5: give a share above 0, at most 1"),
        (lambda: Evicted(0.2, proxy=0), "proxy = 0: give 1 or more"),
        (lambda: Evicted(0.2, random=0.3), "random = 0.3: give a share of the prompt from 0 to keep = 0.2"),
        (lambda: Evicted(0.2, write_weight=-1), "write_weight = -1: give 0 or more"),
        (lambda: fits(RULE, state_only), "no layer of this model has a cache that grows with the text"),
        (lambda: fits(Evicted(0.5), linear), "keep: the read of DeltaFormer is not softmax"),
        (lambda: fits(Evicted(0.5, write_weight=0.0), biased), "keep: the scores of DeltaFormer have a position bias"),
        (lambda: fits(Streaming(1, 2, 4, 12, characters="é"), model), "has no token that consists of"),
        (lambda: resolved(Streaming(1, 2, 4, 12), model, None, 257), "give tokenizer=, or their ids"),
        (lambda: fits(Streaming(1, 2, 4, 12, characters=[300]), model), "characters = 300: give ids from 0 to 256"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()
    with pytest.raises(TypeError, match="by_head = 1: give True or False"):
        Evicted(0.2, by_head=1)
    with pytest.raises(TypeError, match=r"cache = 3: give a Streaming or an Evicted"):
        fits(3, model)
