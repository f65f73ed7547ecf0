"""DeltaFormer's chain over devices: the op of one device on 2, 4 and 8 devices, with fewer heads than devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import AXIS, DEVICES, LONG, compare, draw, over, packed

from deltaformer_jax import delta_attention
from deltaformer_jax.sharding.context.chain import delta_attention_pipeline
from deltaformer_jax.sharding.context.schedule import choose_groups, idle_share, work

LENGTH = 64


def pair(**options):
    """(the form for a device's part, the op of one device)."""
    op = functools.partial(delta_attention, **{**options, "implementation": "parallel"})
    return functools.partial(delta_attention_pipeline, AXIS, **options), op


def inputs(dtype, ids, heads=2, kv_heads=1, write_heads=None, gates=("alpha", "beta")):
    sizes = dict(query=(heads, 4), key=(kv_heads, 4), value=(kv_heads, 3))
    if write_heads:
        sizes["write_query"] = (write_heads, 4)
    sizes |= {gate: (write_heads or kv_heads,) for gate in gates}
    arrays = draw(sizes, LENGTH, dtype, ids=ids)
    return arrays | ({"beta": jax.nn.sigmoid(arrays["beta"])} if "beta" in gates else {})


@pytest.mark.parametrize("devices", DEVICES)
def test_packed_documents(devices):
    ids = packed(LENGTH)
    compare(*pair(), inputs(jnp.float32, ids), ids, devices, 1e-5)


@pytest.mark.parametrize(
    "kv_heads, write_heads", [(1, None), pytest.param(2, 4, marks=LONG), pytest.param(3, 3, marks=LONG)]
)
def test_heads_in_float64(x64, kv_heads, write_heads):
    ids = packed(LENGTH)
    arrays = inputs(jnp.float64, ids, heads=2 * kv_heads, kv_heads=kv_heads, write_heads=write_heads)
    compare(*pair(chunk_size=2), arrays, ids, 4, 1e-12)


@pytest.mark.parametrize("write", ["linear", *(pytest.param(name, marks=LONG) for name in ("round", "relu"))])
def test_similarities_in_float64(x64, write):
    arrays = inputs(jnp.float64, None, gates=("beta",))
    form, op = pair(write_similarity=write, read_similarity="exp", write_scale=0.05, chunk_size=4, write_query="query")
    arrays["beta"] = jnp.concatenate([arrays["beta"], arrays["beta"]], axis=2)
    compare(form, op, arrays, None, 4, 1e-12)


@pytest.mark.long
def test_no_gates(x64):
    arrays = inputs(jnp.float64, None, gates=())
    compare(*pair(), arrays, None, 8, 1e-12)


@pytest.mark.long
def test_narrow_numbers():
    """bfloat16: the chain rounds what the one-device form rounds, and sums blocks in another order."""
    arrays = inputs(jnp.bfloat16, None)
    form, _ = pair()
    op = functools.partial(delta_attention, implementation="chunked", chunk_size=8)
    out = jax.jit(lambda arrays: over(4, form, arrays))(arrays)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), np.float32(op(**arrays)), rtol=0, atol=0.05)


def test_refused():
    arrays = inputs(jnp.float32, None)

    def run(arrays, **options):
        return jax.eval_shape(functools.partial(over, 8, pair(**options)[0]), arrays)

    with pytest.raises(NotImplementedError, match="implementation='triton': the chain over devices has one form"):
        run(arrays, implementation="triton")
    with pytest.raises(NotImplementedError, match="window, keep and initial: the chain over devices has none"):
        run(arrays, window=4)
    odd = {name: x[:, :48] for name, x in arrays.items()}
    with pytest.raises(ValueError, match=r"6 tokens on each of the 8 devices .* multiple of 8, so make .* of 64 tok"):
        run(odd)
    held = jax.tree_util.Partial(lambda scale, s: scale * s, jnp.ones(()))
    with pytest.raises(NotImplementedError, match="a similarity that holds arrays"):
        run(arrays, write_similarity=held)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        total = lambda query: jnp.sum(over(8, pair()[0], {**arrays, "query": query}))
        jax.eval_shape(jax.grad(lambda query: jnp.sum(jax.grad(total)(query))), arrays["query"])


def test_the_schedule():
    steps = work(blocks=16, devices=4, groups=2, reads=3)
    # 16 blocks, each with all blocks before it, and a solve and its own columns for each.
    assert steps.sum() == pytest.approx(16 * 15 / 2 * 4 + 16 * 5)
    assert steps.shape == (17, 4)
    # One group of heads waits for each solve. With more, solves of several groups take place at once.
    assert idle_share(work(128, 8, 4, 1)) < idle_share(work(128, 8, 1, 1)) < 0.25
    assert choose_groups(streams=6, blocks=128, devices=4, reads=1) in (2, 3)
    assert choose_groups(streams=1, blocks=128, devices=4, reads=1) == 1
