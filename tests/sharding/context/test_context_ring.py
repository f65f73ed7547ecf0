"""Softmax attention over the ring of devices: the op of one device on 2, 4 and 8 devices."""

import functools

import jax.numpy as jnp
import pytest
from context_cases import AXIS, DEVICES, LONG, compare, draw, over, packed

from deltaformer_jax import causal_attention
from deltaformer_jax.sharding.context.ring import causal_attention_ring

LENGTH = 32


def pair(**options):
    form = functools.partial(causal_attention_ring, AXIS, **options)
    return form, functools.partial(causal_attention, implementation="parallel", **options)


def inputs(dtype, ids, decay=False, sinks=False):
    sizes = dict(query=(4, 4), key=(2, 4), value=(2, 3)) | ({"log_decay": (4,)} if decay else {})
    arrays = draw(sizes, LENGTH, dtype, ids=ids)
    if decay:
        arrays["log_decay"] = -jnp.abs(arrays["log_decay"])
    return arrays | ({"sinks": jnp.linspace(-1, 1, 4, dtype=dtype)} if sinks else {})


@pytest.mark.parametrize("devices", DEVICES)
def test_packed_documents(devices):
    ids = packed(LENGTH)
    compare(*pair(), inputs(jnp.float32, ids), ids, devices, 1e-5)


@pytest.mark.parametrize(
    "window", [None, pytest.param(6, marks=LONG), 13]
)  # at 4 devices: the whole ring, 1 and 2 earlier devices
@pytest.mark.parametrize("options", [dict(), dict(decay=True, sinks=True)])
def test_in_float64(x64, window, options):
    for ids in (None, packed(LENGTH)) if options else (packed(LENGTH),):
        compare(*pair(window=window), inputs(jnp.float64, ids, **options), ids, 4, 1e-12)


@pytest.mark.long
def test_several_blocks_on_a_device(x64, monkeypatch):
    from deltaformer_jax.ops.softmax import api

    monkeypatch.setattr(api, "default_chunk", lambda length, window=None: 2)
    ids = packed(LENGTH)
    for window in (None, 6):
        compare(*pair(window=window), inputs(jnp.float64, ids, decay=True, sinks=True), ids, 4, 1e-12)


@pytest.mark.long
def test_wide_ids(x64):
    ids = packed(LENGTH).astype(jnp.int64)
    compare(*pair(), inputs(jnp.float64, ids), ids + jnp.where(ids == 7, 1 << 32, 0), 4, 1e-12)


@pytest.mark.long
def test_strong_decay_keeps_its_digits(x64):
    arrays = inputs(jnp.float64, None, decay=True)
    compare(*pair(), arrays | {"log_decay": 300 * arrays["log_decay"]}, None, 4, 1e-12)


def test_refused():
    arrays = inputs(jnp.float32, None)
    with pytest.raises(NotImplementedError, match="implementation='splash': attention over a ring has one form"):
        over(4, functools.partial(causal_attention_ring, AXIS, implementation="splash"), arrays)
    with pytest.raises(NotImplementedError, match="keep and initial: attention over a ring sees no token behind its"):
        over(4, functools.partial(causal_attention_ring, AXIS, window=4, initial=1), arrays)
    odd = {name: x[:, :20] for name, x in arrays.items()}
    with pytest.raises(ValueError, match=r"5 tokens on each of the 4 devices .* be a multiple of 2, so make .* of 8 "):
        over(4, functools.partial(causal_attention_ring, AXIS), odd)
