"""An op spread over eight simulated devices is the op."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from deltaformer_jax import causal_attention, delta_attention, ops
from deltaformer_jax.sharding import over_devices


def mesh(**sizes):
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def draw(rows=4, heads=4, kv_heads=2, write_bias=False, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    sizes = dict(query=(heads, 8), key=(kv_heads, 8), value=(kv_heads, 8), beta=(kv_heads,))
    arrays = {name: jnp.asarray(rng.uniform(size=(rows, 40, *size)), dtype) for name, size in sizes.items()}
    if write_bias:
        arrays["write_bias"] = ops.Kerple(*(jnp.asarray(rng.uniform(size=kv_heads), dtype) for _ in range(2)))
    return {**arrays, "segment_ids": jnp.asarray(np.repeat([[1, 2, 0]], rows, 0).repeat([20, 15, 5], 1))}


CUBE = dict(data=2, fsdp=2, tensor=2, context=1)


@pytest.mark.parametrize(
    "sizes, shape",
    [
        (CUBE, dict()),
        (CUBE, dict(rows=3)),  # rows that four devices don't divide
        (CUBE, dict(heads=3, kv_heads=1)),  # heads that two don't divide
        (dict(tensor=4), dict(heads=8, write_bias=True)),  # more devices than key heads: they share them
        (dict(tensor=4), dict(heads=12, kv_heads=6, write_bias=True)),  # of which none has a whole number
        (dict(rows_of_another_name=8), dict()),
    ],
)
def test_equals_the_op(sizes, shape):
    arrays = draw(**shape)
    gradient = lambda spread: jax.jit(
        jax.value_and_grad(
            lambda floats, ids: (spread(delta_attention, {**floats, "segment_ids": ids}) ** 2).sum(), argnums=0
        )
    )
    ids = arrays.pop("segment_ids")
    expected = gradient(lambda op, arrays: op(**arrays))(arrays, ids)
    with jax.set_mesh(mesh(**sizes)):
        actual = gradient(over_devices)(arrays, ids)
    # The same sums over the same chunks of a row and head.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), actual, expected)


@pytest.mark.parametrize("mixes", [False, True])
def test_a_position_bias_goes_with_its_heads(mixes):
    """Each device has its own heads' numbers of FIRE; DAPE, which mixes heads, is given all heads. Values and gradients
    are those of one device, also of the numbers that all heads or rows share."""
    rng, seen = np.random.default_rng(1), []
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    bias = ops.Fire(jnp.ones(1), 9 * jnp.ones(1), normal(1, 5), normal(1, 5), normal(4, 5))
    if mixes:
        bias = ops.Dape(bias, normal(4, 5), normal(4, 5), normal(1, 5), normal(4, 5))
    arrays = {name: x for name, x in draw().items() if name != "beta"}
    ids = arrays.pop("segment_ids")

    def op(**arrays):
        seen.append(arrays["position_bias"].weight_out.shape)
        return causal_attention(**arrays)

    def gradient(spread):
        loss = lambda floats, bias: (spread(op, {**floats, "position_bias": bias, "segment_ids": ids}) ** 2).sum()
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(arrays, bias)

    expected = gradient(lambda op, arrays: op(**arrays))
    with jax.set_mesh(mesh(**CUBE)):
        actual = gradient(over_devices)
    assert set(seen) == ({(4, 5)} if mixes else {(4, 5), (2, 5)})
    # The same sums over the same chunks of a row and head; the bias's gradients add up over rows and heads.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), actual, expected)


def test_every_device_has_its_own_rows_and_heads():
    seen = []

    def op(**arrays):
        seen.append({name: x.shape for name, x in arrays.items() if x is not None})
        return causal_attention(**arrays)

    arrays = {name: x for name, x in draw().items() if name != "beta"}
    with jax.set_mesh(mesh(**CUBE)):
        out = jax.jit(lambda x: over_devices(op, {**x, "sinks": jnp.zeros(4), "log_decay": None}))(arrays)
    assert out.shape == (4, 40, 4, 8)
    assert seen == [dict(query=(1, 40, 2, 8), key=(1, 40, 1, 8), value=(1, 40, 1, 8), segment_ids=(1, 40), sinks=(2,))]


def test_devices_share_the_key_heads_of_their_query_heads():
    """8 query heads and 2 key heads on 4 devices: each has 2 query heads and one key head, and so half of β."""
    seen = []

    def op(**arrays):
        seen.append({name: x.shape for name, x in arrays.items()})
        return delta_attention(**arrays)

    with jax.set_mesh(mesh(data=2, tensor=4)):
        jax.jit(lambda x: over_devices(op, x))(draw(heads=8))
    one = dict(key=(2, 40, 1, 8), value=(2, 40, 1, 8), beta=(2, 40, 1), segment_ids=(2, 40))
    assert seen == [dict(query=(2, 40, 2, 8), **one)]


def test_a_kernel_lowers_on_a_mesh_because_it_is_told():
    """Splash attention for eight TPU devices: refused by JAX where the compiler would have to cut it."""
    arrays = {name: x.astype(jnp.bfloat16) for name, x in draw().items() if name in ("query", "key", "value")}
    devices = mesh(**CUBE)
    cut = {name: jax.NamedSharding(devices, jax.P(("data", "fsdp"), None, "tensor")) for name in arrays}

    def export(function):
        return jax.export.export(jax.jit(function, in_shardings=(cut,)), platforms=["tpu"])(arrays)

    with jax.set_mesh(devices):
        assert "tpu_custom_call" in export(lambda x: over_devices(causal_attention, x)).mlir_module()
        with pytest.raises(NotImplementedError, match="automatically partitioned"):
            export(lambda x: causal_attention(**x))


@pytest.mark.parametrize("account", [True, False], ids=["axes accounted for", "not"])
@pytest.mark.parametrize("write_query", ["key", "query"])
def test_the_op_in_a_users_own_shard_map(write_query, account):
    """By default shard_map keeps account of the axes that arrays vary over, and loops must keep to it."""
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("rows")
    x = jax.random.normal(jax.random.key(0), (4, 20, 2, 8))
    gradient = jax.grad(lambda x: (delta_attention(x, x, x, write_query=write_query, chunk_size=8) ** 2).sum())
    mapped = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=account))(x)
    # The same arithmetic, in another order.
    np.testing.assert_allclose(mapped, gradient(x), rtol=1e-5, atol=1e-5)
