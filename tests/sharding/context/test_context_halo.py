"""Halos: short convolutions and KV shifting of one device on 2, 4 and 8 devices."""

import jax.numpy as jnp
import pytest
from context_cases import AXIS, DEVICES, compare, draw, over, packed
from flax import nnx

from deltaformer_jax import shift_mix
from deltaformer_jax.layers.short_convolution import ShortConvolution
from deltaformer_jax.sharding.context.halo import over_halo

LENGTH = 32


def clean(function):
    """`function` of arrays without the NaN that convolutions do not have to bear: mixers clear padding first."""
    return lambda x, segment_ids=None, **more: function(x, segment_ids, **more)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("segments", [True, False])
def test_short_convolution(devices, segments):
    ids = packed(LENGTH) if segments else None
    convolution = ShortConvolution(4, 2, 3, has_bias=True, rngs=nnx.Rngs(0))
    call = lambda x, ids: convolution(x, segment_ids=ids)[0]
    form = clean(lambda x, ids: over_halo(call, x, ids, 3, AXIS))
    compare(form, clean(call), draw(dict(x=(2, 3)), LENGTH, jnp.float32, ids=ids), ids, devices, 1e-6)


@pytest.mark.parametrize("devices", DEVICES)
def test_shift_mix(devices):
    ids = packed(LENGTH)
    arrays = draw(dict(x=(2, 3)), LENGTH, jnp.float32, ids=ids)
    arrays |= dict(current=jnp.array([0.3, 0.9]), previous=jnp.array([0.7, -0.4]))
    call = lambda x, ids, current, previous: shift_mix(x, current, previous, segment_ids=ids)

    def form(x, ids, current, previous):
        return over_halo(lambda x, ids: call(x, ids, current, previous), x, ids, 1, AXIS)

    compare(clean(form), clean(call), arrays, ids, devices, 1e-6)


def test_a_halo_longer_than_a_device():
    with pytest.raises(ValueError, match=r"2 tokens on each of the 8 devices .* but a token looks back 3"):
        over(8, lambda x: over_halo(lambda x, ids: x, x, None, 3, AXIS), draw(dict(x=(2, 3)), 16, jnp.float32))
