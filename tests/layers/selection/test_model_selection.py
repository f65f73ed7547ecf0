"""Models whose attention sees a window and, behind it, a document's first tokens and separators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.layers_cases import PLAN, PLAN_LENGTHS, feed
from support.model_cases import LENGTH, ROWS, VOCABULARY, forward, forward_segments, make_model, random_tokens

from deltaformer_jax import Mixer, ModelConfig, ops
from deltaformer_jax.layers.caches import AttentionCache
from deltaformer_jax.layers.mixers.build import resolved_fields

NEAR = dict(rtol=2e-4, atol=2e-4)  # float32, logits of size 1
WINDOW, INITIAL, SEPARATORS = 3, 1, (4, 9, 20)
SEES = dict(window=WINDOW, initial_tokens=INITIAL, separator_tokens=SEPARATORS, implementation="")
# With two key heads for four query heads.
PATTERNS = {
    "forgetting, and w projected, linear": (
        Mixer("softmax_attention", forget_gate=True, kv_shift=True),
        Mixer("delta_former", write_query="projected", write_similarity="linear", window=2),
    ),
    "w = k with position biases, full attention in the first layer": (
        Mixer("softmax_attention", window=0),
        Mixer("delta_former", position_bias="kerple", position_bias_in="both"),
    ),
    "w = q, tied, and no initial tokens": (Mixer("delta_former", write_query="query", initial_tokens=0),),
}


@functools.cache
def model_of(pattern):
    return make_model(num_layers=2, mixers=PATTERNS[pattern], **SEES)


def tokens_with_separators(shape, seed=0):
    """Every fourth token is a separator, on average."""
    random = np.random.default_rng(seed)
    others = random.choice(np.setdiff1d(np.arange(VOCABULARY), SEPARATORS), shape)
    return np.where(random.random(shape) < 0.25, random.choice(SEPARATORS, shape), others).astype(np.int32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_and_decode_with_and_without_eviction(pattern):
    """Chunks and single tokens, padded left and right, give the logits of the whole row; and so they do if every entry
    that the next token does not see is dropped after each call."""
    model, tokens = model_of(pattern), tokens_with_separators((ROWS, LENGTH))
    expected = forward(model, tokens)
    call = jax.jit(lambda block, ids, cache: model(block, segment_ids=ids, cache=cache))

    @jax.jit
    def dropped(cache):
        def one(layer, block):
            if block.mixer.window is None:
                return layer
            drop = lambda memory: ops.compact_cache(memory, ops.visible_entries(memory, block.mixer.window))
            return AttentionCache(jax.vmap(drop)(layer.memory), layer.tail, layer.write_tail)

        return tuple(one(layer, block) for layer, block in zip(cache, model.blocks))

    def evicting(block, ids, cache):
        logits, cache = call(block, ids, cache)
        return logits, dropped(cache)

    for step in (call, evicting):
        outputs, cache = feed(step, model.init_cache(ROWS, LENGTH), tokens, PLAN, padding=2**31 - 1)
        for row, length in enumerate(PLAN_LENGTHS):
            np.testing.assert_allclose(outputs[row], expected[row, :length], **NEAR)
    entries, most = np.asarray(cache[-1].memory.entries), model.blocks[-1].mixer
    for row, length in enumerate(PLAN_LENGTHS):
        index = np.arange(length)
        near = index > length - most.window
        seen = near | (index < most.initial_tokens) | np.isin(tokens[row, :length], SEPARATORS)
        np.testing.assert_array_equal(entries[:, row], seen.sum())


def test_a_window_alone_needs_as_many_slots():
    """DeltaFormer's write sees no more than its read, so that a ring serves it as it serves softmax attention."""
    model = make_model(num_layers=2, mixers=("delta_former", "softmax_attention"), window=WINDOW, implementation="")
    tokens = random_tokens((ROWS, LENGTH))
    assert [cache.memory.capacity for cache in model.init_cache(ROWS, LENGTH)] == [WINDOW, WINDOW]
    call = jax.jit(lambda block, ids, cache: model(block, segment_ids=ids, cache=cache))
    outputs, _ = feed(call, model.init_cache(ROWS, LENGTH), tokens, PLAN, padding=2**31 - 1)
    expected = forward(model, tokens)
    for row, length in enumerate(PLAN_LENGTHS):
        np.testing.assert_allclose(outputs[row], expected[row, :length], **NEAR)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_documents_are_those_alone(pattern):
    """The first tokens are those of each document; what stands in the padding, separators among it, is not seen."""
    model, documents = model_of(pattern), tokens_with_separators((3, 5), 1)
    tokens, ids = np.full((ROWS, LENGTH), SEPARATORS[0], np.int32), np.zeros((ROWS, LENGTH), np.int32)
    places = [(0, slice(1, 6)), (0, slice(6, 11)), (1, slice(4, 9))]
    for number, (place, document) in enumerate(zip(places, documents)):
        tokens[place], ids[place] = document, 7 - number
    packed = forward_segments(model, tokens, ids)
    for number, place in enumerate(places):
        row = np.zeros((ROWS, LENGTH), np.int32)
        row[0, :5] = documents[number]  # what comes after it, it doesn't see
        np.testing.assert_allclose(packed[place], forward(model, row)[0, :5], **NEAR)


@pytest.mark.parametrize(
    ("mixer", "reach"), [("softmax_attention", "direct"), ("delta_former", "through u")], ids=["softmax", "delta"]
)
def test_a_token_changes_what_sees_it_and_nothing_else(mixer, reach):
    """One layer. The change of a token reaches the tokens that see it, in DeltaFormer also those that see these."""
    model = make_model(num_layers=1, mixers=(mixer,), **SEES)
    tokens = tokens_with_separators((LENGTH,), 2)
    index = np.arange(LENGTH)
    behind = (index < INITIAL) | np.isin(tokens, SEPARATORS)
    ago = index[:, None] - index
    sees = (ago >= 0) & ((ago < WINDOW) | behind)
    assert not sees[np.tril_indices(LENGTH)].all() and behind[INITIAL : LENGTH - WINDOW].any()
    if reach == "through u":  # o_t reads u_i, and u_i holds the u of what i sees
        through = np.linalg.matrix_power((sees | np.eye(LENGTH, dtype=bool)).astype(int), LENGTH) > 0
        assert (through != sees).any()
        sees = through
    # A separator stays one, any other token one of the others.
    other = np.where(np.isin(tokens, SEPARATORS), np.where(tokens == 4, 9, 4), np.where(tokens == 1, 2, 1))
    rows = np.where(np.eye(LENGTH + 1, LENGTH, dtype=bool), other, tokens).astype(np.int32)  # the last is unchanged
    logits = np.asarray(model(rows)[0])
    changed = np.abs(logits[:-1] - logits[-1]).max(axis=-1) > 0
    np.testing.assert_array_equal(changed.T, sees)


def test_a_window_over_everything_and_separators_everywhere_are_full_attention():
    tokens, both = random_tokens((ROWS, LENGTH)), dict(num_layers=2, mixers=("softmax_attention", "delta_former"))
    full = forward(make_model(**both), tokens)
    for sees in (
        dict(window=LENGTH, initial_tokens=2, separator_tokens=(3,)),
        dict(window=1, separator_tokens=tuple(range(1, VOCABULARY)), initial_tokens=LENGTH),
    ):
        np.testing.assert_allclose(forward(make_model(**both, **sees), tokens), full, **NEAR)


def test_a_layer_without_a_window_is_as_if_there_were_no_separators():
    """SepLLM's full layers: nothing of the model's other layers is in them."""
    layers = (Mixer("delta_former", window=0), "delta_former", Mixer("delta_former", window=None))
    model, plain = (make_model(num_layers=3, mixers=layers, **fields) for fields in (SEES, dict(implementation="")))
    for place, same in enumerate((True, False, True)):
        assert (nnx.split(model.blocks[place])[0] == nnx.split(plain.blocks[place])[0]) is same
    memories = [type(cache.memory) for cache in model.init_cache(1, 4)]
    assert memories == [ops.KUCache, ops.SelectedKUCache, ops.KUCache]
    window_only = make_model(num_layers=2, mixers=("delta_former", "softmax_attention"), window=3)
    assert [type(cache.memory) for cache in window_only.init_cache(1, 4)] == [ops.KUCache, ops.KVCache]
    config = ModelConfig(**{name: value for name, value in SEES.items()})
    assert resolved_fields(config, Mixer("delta_former", window=0))["separator_tokens"] == ()
    assert resolved_fields(config, "delta_former")["separator_tokens"] == SEPARATORS


def test_operations_of_layers_with_and_without_separators():
    """A window costs its band, a first token one more score for each token that has it behind its window. Separators
    are not counted. All scores are computed, and counted, where a forgetting gate or a self-adjusted read needs them.
    """
    for mixer in ("softmax_attention", "delta_former"):
        flops = lambda mixer=mixer, **sees: (
            make_model(num_layers=1, mixers=(mixer,), **sees).blocks[0].mixer.flops_per_token(64)
        )
        projections = make_model(num_layers=1, mixers=(mixer,)).blocks[0].mixer.flops_per_token(0)
        band = (flops(window=8) - projections) / (flops() - projections)
        assert band == pytest.approx((8 - 8**2 / 128) / 32)
        more = flops(window=8, initial_tokens=3) - flops(window=8)
        behind = sum(min(3, max(0, t - 7)) for t in range(64))
        assert more / (flops() - projections) == pytest.approx(behind / 64 / 32)
        assert flops(window=8, separator_tokens=(1,)) == flops(window=8)
        adjusted = dict(read_similarity="self_adjust")
        assert flops(window=8, initial_tokens=1, **adjusted) == flops(**adjusted)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(initial_tokens=2), "model.initial_tokens = 2: without a window every token sees all before it"),
        (dict(separator_tokens=(1,)), r"model.separator_tokens = \(1,\): without a window"),
        (dict(separators="."), "model.separators = '.': programs look them up in the tokenizer; without one give"),
        (
            dict(window=2, separator_tokens=(1, 37)),
            "model.separator_tokens = .*: 37 is not below model.vocab_size = 37",
        ),
        (dict(window=2, separator_tokens=(-1,)), "model.separator_tokens = .*: must be a tuple of ids of tokens"),
        (dict(window=2, separator_tokens="."), "model.separator_tokens = '.': must be a tuple of ids of tokens"),
        (dict(window=2, initial_tokens=-1), "model.initial_tokens = -1: must be at least 0"),
        (dict(mixers=("retention",), window=2, initial_tokens=1), "model.window = 2: no mixer"),
        (
            dict(mixers=(Mixer("retention", initial_tokens=1), Mixer("softmax_attention", window=2))),
            "an override of retention: 'initial_tokens' is not one of",
        ),
        (
            dict(mixers=(Mixer("delta_former", initial_tokens=1), Mixer("softmax_attention", window=2))),
            "model.initial_tokens=1 needs a window: without one every token sees all before it .of Mixer",
        ),
        (
            dict(mixers=(Mixer("softmax_attention", window=2, separator_tokens=(40,)),)),
            "model.separator_tokens = .40,.: 40 is not below",
        ),
    ],
)
def test_what_can_not_be(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        make_model(**dict(mixers=("delta_former", "softmax_attention")) | fields)
    assert "\n" not in str(error.value)


def test_a_mixer_by_itself_needs_its_separators():
    mixer = make_model(num_layers=1, mixers=("softmax_attention",), **SEES).blocks[0].mixer
    x = jnp.zeros((1, 4, 16))
    with pytest.raises(ValueError, match=r"keep: bool .* goes with separator_tokens; the mixer was given none"):
        mixer(x)
    plain = make_model(num_layers=1, mixers=("softmax_attention",)).blocks[0].mixer
    with pytest.raises(ValueError, match=r"keep: .*; the mixer has no separator_tokens"):
        plain(x, keep=jnp.zeros((1, 4), bool))


class Marked(nnx.Module):
    """A mixer of a user's own, which adds 1 to separators and 0 to other tokens."""

    def __init__(self, d_model: int, *, separator_tokens: tuple[int, ...] = (), rngs: nnx.Rngs):
        self.separator_tokens = separator_tokens

    def __call__(self, x, *, segment_ids=None, positions=None, cache=None, keep=None):
        assert (keep is not None) == bool(self.separator_tokens)
        return jnp.zeros_like(x) if keep is None else jnp.broadcast_to(keep[..., None], x.shape).astype(x.dtype), cache

    def init_cache(self, batch, capacity):
        raise NotImplementedError

    def flops_per_token(self, length):
        return 0.0


def test_a_mixer_of_your_own_is_told_where_its_separators_are():
    mixers = (Mixer(Marked, separator_tokens=(3, 7)), Mixer(Marked), Mixer(Marked, separator_tokens=(7,)))
    model = make_model(num_layers=3, mixers=mixers)
    tokens = np.array([[1, 3, 7, 0]], np.int32)

    for block in model.blocks:
        block.mlp.down[...] = jnp.zeros_like(block.mlp.down[...])
    _, added = model.look(tokens, lambda before, after, real: after - before)
    np.testing.assert_allclose(added[:, 0, :, 0], [[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 0]], atol=1e-6)
