"""Softmax attention by the Triton kernels: their arithmetic, interpreted, against the definition in float64, and which
calls take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is in the dependency group `kernels`, on Linux")

from support.triton_worker import Worker

from deltaformer_jax import causal_attention
from pallas_kernels.triton import packages

pytestmark = pytest.mark.long

needs_jax_triton = pytest.mark.skipif(
    packages.missing() is not None, reason="jax-triton and JAX's CUDA plugin are in the dependency group `kernels`"
)
TILES = (("read_forward", (16, 16, 4, 1)), ("read_backward", (16, 32, 4, 1)))
UNIT = {"float32": 2.0**-14, "bfloat16": 2.0**-8}  # rounding of a product's operands; tf32x3 is finer than that


@pytest.fixture(scope="module")
def interpreter():
    worker = Worker()
    yield worker
    worker.close()


def draw(dtype, heads=4, kv_heads=2, time=40, width=24, value_width=16):
    rng = np.random.default_rng(0)
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width))
    return [rng.standard_normal((2, time, *size)).astype(jnp.dtype(dtype)) for size in sizes]


def documents(time):
    return np.sort(np.random.default_rng(1).integers(1, 4, (2, time)), axis=1).astype(np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("sizes", [{}, {"heads": 2, "time": 33, "value_width": 40}], ids=["grouped", "wider values"])
def test_values_and_gradients(interpreter, dtype, packed, sizes):
    *arrays, dout = draw(dtype, **sizes)
    segments = documents(arrays[0].shape[1]) if packed else None
    scale = arrays[0].shape[3] ** -0.5
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in arrays]
        call = lambda *x: causal_attention(*x, segment_ids=segments, implementation="recurrent")
        expected, pull = jax.vjp(call, *wide)
        expected = [expected, *pull(jnp.asarray(dout, jnp.float64))]
    out, (*gradients, decay, sinks) = interpreter(
        "attention_forward_and_backward", scale, TILES, [*arrays, segments], dout
    )
    assert decay is None and sinks is None and out.dtype == jnp.dtype(dtype)
    # An output takes a rounding of its weights and of itself; a gradient sums over the width, and rounds dS too.
    for found, right, roundings in zip([out, *gradients], expected, (2, 8, 8, 4)):
        largest = float(np.max(np.abs(right)))
        np.testing.assert_allclose(np.float64(found), right, rtol=0, atol=roundings * UNIT[dtype] * largest)


def kernels(function, *arguments):
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("@triton_kernel_call")


@needs_jax_triton
def test_packed_calls_take_them_unasked_and_what_they_lack_is_chunked():
    query, key, value, _ = map(jnp.asarray, draw("bfloat16"))
    segments = documents(40)

    def loss(query, key, value, **options):
        return causal_attention(query, key, value, **options).astype(jnp.float32).sum()

    for options in ({"segment_ids": segments}, {"implementation": "triton"}):
        call = lambda *x, options=options: loss(*x, **options)
        assert kernels(call, query, key, value) == 1
        assert kernels(jax.grad(call, (0, 1, 2)), query, key, value) == 2
    lacking = {"window": 8, "log_decay": -0.1, "sinks": jnp.zeros(4)}
    for name, given in lacking.items():
        call = lambda *x, options={name: given}: loss(*x, segment_ids=segments, **options)
        assert kernels(call, query, key, value) == 0
        with pytest.raises(NotImplementedError, match=f"implementation='triton': its kernels have no {name}; use None"):
            causal_attention(query, key, value, implementation="triton", **{name: given})


@needs_jax_triton
def test_a_rematerialised_block_keeps_what_the_forward_pass_made():
    from pallas_kernels.transform import MADE

    arrays = list(map(jnp.asarray, draw("bfloat16")[:3]))
    call = lambda *x: causal_attention(*x, segment_ids=documents(40)).astype(jnp.float32).sum()
    again = jax.checkpoint(call, prevent_cse=False)
    kept = jax.checkpoint(call, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names(MADE))
    assert [kernels(jax.value_and_grad(f, (0, 1, 2)), *arrays) for f in (again, kept)] == [3, 2]
