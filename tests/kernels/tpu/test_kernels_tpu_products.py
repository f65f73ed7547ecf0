"""The TPU kernels' products in tiles, run as they are on the CPU: of whole eighths, which every order sums exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.tpu import matrix_unit


def eighths(*shape):
    return np.random.default_rng(sum(shape)).integers(-8, 9, shape).astype(np.float32) / 8


def on(kind):
    """As in a program that is compiled for this kind of TPU."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("kind, side", [("TPU v5 lite", 128), ("TPU v5", 128), ("TPU v6 lite", 256), ("TPU7x", 256)])
def test_the_size_of_a_unit(kind, side):
    with on(kind):
        assert matrix_unit.unit_side() == side
    assert matrix_unit.unit_side() == 128


@pytest.mark.parametrize("side", [128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_product_in_tiles(dtype, side, monkeypatch):
    """The last tile is what is left: three of 128, or one of 256 and one of 128."""
    monkeypatch.setattr(matrix_unit, "unit_side", lambda: side)
    a, b = eighths(384, 24), eighths(256, 24)
    np.testing.assert_array_equal(matrix_unit.product_in_tiles(a, b, dtype), a @ b.T)


@pytest.mark.parametrize("size", [128, 384])
def test_products_of_tiles_on_and_above_the_diagonal(size):
    a, b, x = eighths(size, 24), eighths(size, 24), eighths(40, size)
    tile = np.arange(size) // 128
    upper = (a @ b.T) * (tile[:, None] <= tile)
    np.testing.assert_array_equal(matrix_unit.upper_product(a, b, jnp.float32), upper)
    # Rounded to eighths again, small enough for sums without rounding; below the diagonal is what must not be read.
    upper = np.round(upper)
    hidden = np.where(tile[:, None] <= tile, upper, np.nan)
    np.testing.assert_array_equal(matrix_unit.times_upper(x, hidden, jnp.float32), x @ upper)
    np.testing.assert_array_equal(matrix_unit.upper_times(hidden, x.T, jnp.float32), upper @ x.T)
