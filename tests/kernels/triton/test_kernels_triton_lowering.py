"""The Triton kernels in JAX programs lowered for CUDA: what jit, vmap and derivatives make of them; what is refused."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from pallas_kernels.triton.delta import api as delta
from pallas_kernels.triton.delta import launches as delta_launches
from pallas_kernels.triton.delta.table import TABLE, choose

SOFTMAX = delta.Kappa("softmax", 0.1)
SEPARATE = delta.Settings(SOFTMAX, SOFTMAX, compute_capability=90)
TIED = delta.Settings(SOFTMAX, None, True, 90)

_array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def both(settings):
    def run(query, key, value, beta, segment_ids, dout):
        out, u, residuals = delta.forward(settings, query, None, key, value, None, beta, segment_ids)
        return out, delta.backward(settings, residuals, dout, jnp.zeros_like(u))

    return run


def lowered_calls(function, *arguments):
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("@triton_kernel_call")


def needs_the_plugin():
    """jax-triton describes its calls with a library of JAX's CUDA plugin; it needs no GPU."""
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        # Without it jax-triton does not even import.
        pytest.skip("JAX's CUDA plugin (extra `cuda`) is not installed")
    pytest.importorskip("jax_triton", reason="jax-triton is in the dependency group `kernels`, on Linux")


def arguments(*batch):
    x = _array(*batch, 256, 4, 64)
    ids = jax.ShapeDtypeStruct((*batch, 256), jnp.int32)
    return x, x, x, _array(*batch, 256, 4), ids, x


@pytest.mark.parametrize(
    "settings, calls", [(SEPARATE, 4), pytest.param(TIED, 2, marks=pytest.mark.long)], ids=["separate", "tied"]
)
def test_lowers_for_cuda(settings, calls):
    needs_the_plugin()
    assert lowered_calls(both(settings), *arguments(2)) == calls


def test_vmap_folds_the_batch():
    needs_the_plugin()
    query, key, value, _, *rest = arguments(3, 2)
    shared_beta = arguments(2)[3]
    mapped = jax.vmap(both(SEPARATE), in_axes=(0, 0, 0, None, 0, 0))
    assert lowered_calls(mapped, query, key, value, shared_beta, *rest) == 4


def test_jvp_is_refused():
    needs_the_plugin()
    x = _array(2, 256, 4, 64)
    forward = lambda q: delta.forward(SEPARATE, q, None, q, q, None, None, None)[0]
    with pytest.raises(NotImplementedError, match="no second derivative and no forward-mode derivative"):
        jax.eval_shape(lambda q: jax.jvp(forward, (q,), (q,)), x)


def test_what_is_refused():
    float64 = jax.ShapeDtypeStruct((1, 8, 1, 16), np.float64)
    assert "float64" in delta.lacks(SEPARATE, float64, float64)
    assert "up to 256" in delta.lacks(SEPARATE, _array(1, 8, 1, 512), _array(1, 8, 1, 16))
    assert delta.lacks(SEPARATE, _array(1, 8, 1, 256), _array(1, 8, 1, 16)) is None
    float16 = jax.ShapeDtypeStruct((1, 8, 1, 16), np.float16)
    linear = delta.Settings(delta.Kappa("linear", 1.0), SOFTMAX)
    assert delta.lacks(SEPARATE, float16, float16) is None
    assert "'linear' in bfloat16 and float32 only; float16 needs softmax" in delta.lacks(linear, float16, float16)
    assert delta.lacks(linear, _array(1, 8, 1, 16), _array(1, 8, 1, 16)) is None
    with pytest.raises(NotImplementedError, match="compute capability"):
        choose("read_forward", 75, 64, "narrow")


def test_the_table_knows_architectures_between_its_own():
    assert choose("read_forward", 103, 128, "narrow") == TABLE[100]["read_forward", "narrow"][1]
    assert choose("read_forward", 86, 128, "narrow") == TABLE[120]["read_forward", "narrow"][1]
    assert choose("read_forward", 90, 24, "narrow") == TABLE[90]["read_forward", "narrow"][0]


def test_first_columns_and_last_rows():
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0, 3]], jnp.int32)
    assert delta_launches.first_columns(ids, 4).tolist() == [[0, 3, 7]]
    assert delta_launches.last_rows(ids, 4).tolist() == [[7, 9, 10]]


def test_a_width_without_a_tile_is_refused():
    float32 = jax.ShapeDtypeStruct((1, 8, 1, 256), jnp.float32)
    settings = delta.Settings(SOFTMAX, SOFTMAX, compute_capability=120)
    assert "no tile of the Triton kernel read_backward fits head dimension 256" in delta.lacks(
        settings, float32, float32
    )
    assert delta.lacks(settings, _array(1, 8, 1, 256), _array(1, 8, 1, 256)) is None
