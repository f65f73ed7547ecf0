"""All-to-all over heads: the op of one device on 2, 4 and 8 devices."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import AXIS, DEVICES, compare, draw, over, packed

from deltaformer_jax import causal_attention, delta_attention, gated_delta_rule
from deltaformer_jax.sharding.context.heads import over_heads

LENGTH = 32


def spread(op):
    return lambda **arrays: over_heads(op, arrays, AXIS)


@pytest.mark.parametrize("devices", DEVICES)
def test_delta_attention(devices):
    ids = packed(LENGTH)
    sizes = dict(query=(16, 4), key=(8, 4), value=(8, 3), alpha=(16,), beta=(16,), write_query=(16, 4))
    arrays = draw(sizes, LENGTH, jnp.float32, ids=ids)
    arrays["beta"] = jnp.clip(arrays["beta"], 0, 1)
    op = functools.partial(delta_attention, implementation="chunked", chunk_size=8)
    compare(spread(op), op, arrays, ids, devices, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("similarity", ["linear", "round"])
def test_delta_attention_in_float64(x64, similarity):
    arrays = draw(dict(query=(8, 4), key=(4, 4), value=(4, 3), beta=(4,)), LENGTH, jnp.float64)
    arrays["key"] = 0.5 * arrays["key"]
    op = functools.partial(
        delta_attention, write_similarity=similarity, write_scale=0.1, implementation="chunked", chunk_size=8
    )
    compare(spread(op), op, arrays, None, 4, 1e-12)


def test_softmax_attention_with_sinks_and_decay():
    ids = packed(LENGTH)
    arrays = draw(dict(query=(8, 4), key=(4, 4), value=(4, 3), log_decay=(8,)), LENGTH, jnp.float32, ids=ids)
    arrays |= dict(log_decay=-jnp.abs(arrays["log_decay"]), sinks=jnp.linspace(-1, 1, 8))
    op = functools.partial(causal_attention, window=11, implementation="chunked")
    compare(spread(op), op, arrays, ids, 4, 1e-5)


def test_tokens_that_last_are_known_on_every_device():
    ids = packed(LENGTH)
    arrays = draw(dict(query=(8, 4), key=(4, 4), value=(4, 3)), LENGTH, jnp.float32)
    arrays |= dict(segment_ids=ids, keep=jnp.arange(2 * LENGTH).reshape(2, LENGTH) % 5 == 1)
    op = functools.partial(delta_attention, window=3, initial=1, implementation="chunked", chunk_size=8)
    np.testing.assert_allclose(over(4, spread(op), arrays), op(**arrays), rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_a_gated_op():
    ids = packed(LENGTH)
    arrays = draw(dict(query=(4, 4), key=(4, 4), value=(8, 3), log_decay=(8, 4)), LENGTH, jnp.float32, ids=ids)
    arrays |= dict(log_decay=-jnp.abs(arrays["log_decay"]), key=0.3 * arrays["key"])
    op = lambda **arrays: gated_delta_rule(**arrays, implementation="chunked", chunk_size=8)[0]
    compare(spread(op), op, arrays, ids, 4, 1e-5)


def test_heads_that_do_not_divide():
    arrays = draw(dict(query=(8, 4), key=(2, 4), value=(2, 4)), LENGTH, jnp.float32)
    with pytest.raises(ValueError, match="key has 2 heads, which the 4 devices of the mesh axis 'context' do not"):
        over(4, spread(delta_attention), arrays)
