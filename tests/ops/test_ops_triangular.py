"""The inverse of a unit lower triangular block, where powers of A would lose everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaformer_jax.ops.common.triangular import (
    invert_unit_lower,
    solve_by_halves,
    solve_unit_lower,
    solve_unit_lower_transposed,
)


def alike_keys(n, width=128, cosine=0.9, seed=0):
    """n unit keys whose mean cosine is about `cosine`."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(width)
    common /= np.linalg.norm(common)
    own = rng.standard_normal((n, width))
    own /= np.linalg.norm(own, axis=1, keepdims=True)
    keys = np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own
    return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def relative_error(actual, expected):
    return np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()


def test_inverse_of_alike_keys_in_float32():
    """Linear similarity, unit keys of mean cosine 0.9, 128 rows: below 1e-4, where the Neumann product fails."""
    keys = alike_keys(128)
    assert abs((keys @ keys.T)[np.tri(128, k=-1) > 0].mean() - 0.9) < 0.02
    a = np.tril(keys @ keys.T, -1)
    exact = np.linalg.inv(np.eye(128) + a)
    narrow = jnp.asarray(a, jnp.float32)
    # Measured: about 1e-7. The bound is the one promised.
    assert relative_error(invert_unit_lower(narrow), exact) < 1e-4
    values = np.random.default_rng(1).standard_normal((128, 16))
    narrow_values = jnp.asarray(values, jnp.float32)
    assert relative_error(solve_unit_lower(narrow, narrow_values), exact @ values) < 1e-4
    assert relative_error(solve_unit_lower_transposed(narrow, narrow_values), exact.T @ values) < 1e-4

    power, product = -narrow, jnp.eye(128, dtype=jnp.float32) - narrow
    for _ in range(6):
        power = power @ power
        product = product @ (jnp.eye(128, dtype=jnp.float32) + power)
    assert not relative_error(product, exact) < 1


@pytest.mark.parametrize("n", [1, 2, 3, 16, 63, 64, 65, 100, 130, 192, 300])
def test_any_size(n, x64):
    """Sizes that are no power of two and no multiple of the block; on and above the diagonal nothing is read."""
    rng = np.random.default_rng(n)
    a = rng.standard_normal((n, n)) / np.sqrt(n)
    exact = np.linalg.inv(np.eye(n) + np.tril(a, -1))
    b = rng.standard_normal((n, 3))
    upper_poison = jnp.asarray(np.where(np.tri(n, k=-1) > 0, a, np.nan))
    bound = 8 * n * np.finfo(float).eps * np.linalg.cond(exact)
    assert relative_error(invert_unit_lower(upper_poison), exact) < bound
    assert relative_error(solve_unit_lower(upper_poison, jnp.asarray(b)), exact @ b) < bound
    assert relative_error(solve_by_halves(upper_poison, jnp.asarray(b)), exact @ b) < bound
    assert relative_error(solve_unit_lower_transposed(upper_poison, jnp.asarray(b)), exact.T @ b) < bound


def test_batches_of_blocks(x64):
    a = np.tril(np.random.default_rng(0).standard_normal((3, 2, 10, 10)), -1)
    inverse = jax.jit(invert_unit_lower)(jnp.asarray(a))
    np.testing.assert_allclose(inverse @ (np.eye(10) + a), np.broadcast_to(np.eye(10), a.shape), atol=1e-10)
