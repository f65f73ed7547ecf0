"""What the tests of context parallelism share: packed rows, and an op on 1 and on P devices with its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

AXIS = "context"
LONG = pytest.mark.long
DEVICES = (pytest.param(2, marks=LONG), 4, pytest.param(8, marks=LONG))


@functools.cache
def mesh(devices):
    return jax.make_mesh((devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def packed(length):
    """Segment ids [2, length]. Row 0: padding within, documents that cross 0, 1 and several devices, one that begins
    at a device's first token (of 2, 4 and 8). Row 1: padding on both sides, which fills devices, and one document."""
    ids = np.zeros((2, length), np.int32)
    eighth = length // 8
    ids[0, : eighth // 2] = 3
    ids[0, eighth // 2 + 2 : 4 * eighth] = 7
    ids[0, 4 * eighth : 5 * eighth - 1] = 2
    ids[0, 5 * eighth - 1 : 7 * eighth + 1] = 9
    ids[0, 7 * eighth + 1 : length - 3] = 5
    ids[1, 2 * eighth + 1 : 6 * eighth + 3] = 4
    return jnp.asarray(ids)


def draw(sizes, length, dtype, seed=0, ids=None):
    """Arrays [2, length, *size] of normal numbers by name; with `ids`, NaN where they are 0."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=(2, length, *size)) for name, size in sizes.items()}
    if ids is not None:
        for x in arrays.values():
            x[np.asarray(ids) == 0] = np.nan
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def over(devices, form, arrays):
    """form(**arrays), a function for one device's part, on `devices` devices. Arrays without a time axis are whole."""
    whole = ("sinks", "initial_state", "current", "previous")
    specs = {name: PartitionSpec() if name in whole else PartitionSpec(None, AXIS) for name in arrays}
    spread = lambda arrays: form(**arrays)
    out = PartitionSpec(None, AXIS)
    return jax.shard_map(spread, mesh=mesh(devices), in_specs=(specs,), out_specs=out, check_vma=False)(arrays)


def value_and_gradients(function, arrays, ids, options=None):
    """function(arrays, ids) and the gradients of a fixed weighted sum of it, in every array, both jitted; `options` are
    the compiler's."""

    def total(arrays):
        out = function(arrays, ids)
        weights = jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return jnp.sum(out * weights), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=options)(arrays)
    return {"out": out, **gradients}


def assert_close(actual, expected, tolerance):
    """Each array agrees to `tolerance` times the largest of its numbers, and is finite."""
    for name, x in expected.items():
        x, y = np.asarray(x), np.asarray(actual[name])
        assert np.all(np.isfinite(y)), f"{name} is not finite"
        error = np.max(np.abs(x - y)) / max(1.0, np.max(np.abs(x)))
        assert error <= tolerance, f"{name}: {error:.2e}"


def compare(form, op, arrays, ids, devices, tolerance, options=None):
    """form on `devices` devices against op on one: values and gradients. Both take arrays and segment_ids by name."""
    with_ids = lambda arrays, ids: arrays if ids is None else {**arrays, "segment_ids": ids}
    expected = value_and_gradients(lambda arrays, ids: op(**with_ids(arrays, ids)), arrays, ids, options)
    spread = lambda arrays, ids: over(devices, form, with_ids(arrays, ids))
    assert_close(value_and_gradients(spread, arrays, ids, options), expected, tolerance)
