"""The triangular systems of the TPU kernels' chunks, run as they are on the CPU, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.tpu.delta.triangular import solve_across, solve_across_transposed, tile_inverses
from pallas_kernels.tpu.matrix_unit import TILE

ROWS, WIDTH = 3 * TILE, 24


def unit_keys(mean_cosine):
    """Aᵀ of β = 1 and the linear similarity of unit keys that have this cosine with one another, and noise."""
    rng = np.random.default_rng(0)
    common, own = rng.standard_normal(64), rng.standard_normal((ROWS, 64))
    own -= np.outer(own @ common, common) / (common @ common)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    keys = np.sqrt(mean_cosine) * unit(common) + np.sqrt(1 - mean_cosine) * unit(own)
    return np.triu(keys @ keys.T, 1)


def softmax_rows(sharpness):
    """Aᵀ of β = 1 and softmax; a row sees at most one column where `sharpness` is large."""
    scores = sharpness * np.random.default_rng(1).standard_normal((ROWS, ROWS))
    weights = np.tril(np.exp(scores - scores.max(axis=1, keepdims=True)), -1)
    total = weights.sum(axis=1, keepdims=True)
    return (weights / np.where(total > 0, total, 1.0)).T


SYSTEMS = {
    "alike": unit_keys(0.9),
    "orthogonal": unit_keys(0.0),
    "softmax": softmax_rows(1.0),
    "one-hot": np.round(softmax_rows(1000.0)),
    "the row before": np.eye(ROWS, k=1),
}


@pytest.fixture(params=SYSTEMS.values(), ids=SYSTEMS)
def system(request):
    """[columns, rows], as float32 or bfloat16 operands hold it exactly."""
    return request.param


def rounded(x, dtype):
    return np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype, unit", [(jnp.float32, 2.0**-24), (jnp.bfloat16, 2.0**-9)], ids=["float32", "bfloat16"])
def test_against_float64(system, dtype, unit, transposed):
    """A substitution in float64 is the definition. The bound is that of a stable one: a rounding of each number that a
    product takes or gives is amplified by the inverse, and there are as many as steps: joins, tiles, and products."""
    a, b = rounded(system, dtype), rounded(np.random.default_rng(2).standard_normal((WIDTH, ROWS)), dtype)
    inverse = np.linalg.inv(np.eye(ROWS) + a)
    solve = solve_across_transposed if transposed else solve_across
    expected = b @ (inverse.T if transposed else inverse)
    found = np.asarray(solve(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), dtype), np.float64)
    absolute = np.abs(inverse.T if transposed else inverse)
    grown = np.abs(expected) @ np.abs(np.eye(ROWS) + (a.T if transposed else a)) @ absolute
    assert np.all(np.abs(found - expected) <= 16 * unit * grown)


def test_inverses_of_tiles(system):
    found = tile_inverses(jnp.asarray(system, jnp.float32), jnp.float32)
    for n, x in enumerate(found):
        tile = rounded(system, jnp.float32)[n * TILE : (n + 1) * TILE, n * TILE : (n + 1) * TILE]
        expected = np.linalg.inv(np.eye(TILE) + tile)
        grown = np.abs(expected) @ np.abs(np.eye(TILE) + tile) @ np.abs(expected)
        assert np.all(np.abs(np.asarray(x) - expected) <= 16 * 2.0**-24 * grown)
        assert not np.any(np.tril(np.asarray(x), -1))


def test_what_lies_in_other_tiles_is_not_of_an_inverse(system):
    """A tile's inverse is the same when the rest of the system is anything at all."""
    index = np.arange(ROWS) // TILE
    poisoned = np.where(index[:, None] == index, system, np.nan)
    for x, y in zip(*(tile_inverses(jnp.asarray(a, jnp.float32), jnp.float32) for a in (system, poisoned))):
        np.testing.assert_array_equal(x, y)
