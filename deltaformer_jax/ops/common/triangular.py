"""(I + A)⁻¹ for strictly lower triangular A, by steps that never form a power of A.

The ladder doubles the size of the blocks that are already inverted: with X the inverse of I + (A inside its b-blocks)
and L_b the part of A inside the 2b-blocks but outside the b-blocks,

    X ← X − X L_b X,      b = 1, 2, 4, …

which is exact at each step, because [[M₁, 0], [L, M₂]]⁻¹ = [[X₁, 0], [−X₂ L X₁, X₂]]. The Neumann product
(I − A)(I + A²)(I + A⁴)… is as short, but cancels huge powers when keys are alike: for unit keys of mean cosine 0.9 and
128 rows it loses all digits in float32, where the ladder keeps seven (tests/ops/test_ops_triangular.py).

Where the size is a power of two the same steps are taken on the halves alone (`invert_blocks`), which is C³/3
multiply-adds where the ladder's masked products are 2 C³ log₂ C. Inverting 64-row diagonal blocks and substituting
block by block costs less than inverting the whole and is as exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Rows of a diagonal block that is inverted outright.
BLOCK = 64

_HIGHEST = jax.lax.Precision.HIGHEST


def _matmul(a, b):
    return jnp.matmul(a, b, precision=_HIGHEST)


def invert_unit_lower(a: jax.Array) -> jax.Array:
    """(I + A)⁻¹ by the ladder; `a` [..., n, n], its diagonal and upper triangle are not read.

    Cost: 2 ⌈log₂ n⌉ products of n×n matrices. Error: a few roundings times ‖(I+A)⁻¹‖, for any A.
    """
    n = a.shape[-1]
    row = jnp.arange(n)[:, None]
    column = jnp.arange(n)[None, :]
    inverse = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape)
    b = 1
    while b < n:
        below = (row // (2 * b) == column // (2 * b)) & (row // b > column // b)
        step = jnp.where(below, a, 0)
        # The first X is the identity.
        inverse = inverse - (step if b == 1 else _matmul(_matmul(inverse, step), inverse))
        b *= 2
    return inverse


def invert_blocks(a):
    """(I + A)⁻¹ of m strictly lower triangular A [..., m, C, C], C a power of two; the rest of `a` is not read.

    [[M₁, 0], [L, M₂]]⁻¹ = [[X₁, 0], [−X₂ L X₁, X₂]], from single rows up: C³/3 multiply-adds, no power of A.
    """
    *lead, blocks, size, _ = a.shape
    half = size // 2
    if half == 0:
        return jnp.ones_like(a)
    diagonal = jnp.stack([a[..., :half, :half], a[..., half:, half:]], axis=-3)
    inverses = invert_blocks(diagonal.reshape(*lead, 2 * blocks, half, half))
    below = a[..., half:, :half]
    if half > 1:
        first, second = halves(inverses)
        below = _matmul(_matmul(second, below), first)
    return join_blocks(inverses, -below)


def halves(x):
    """[..., 2m, ., .] -> two of [..., m, ., .]: the first and the second block of each pair."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def join_blocks(diagonal, below):
    """[..., 2m, b, b] and [..., m, b, b] -> [..., m, 2b, 2b]: [[first, 0], [below, second]] of each pair of blocks."""
    first, second = halves(diagonal)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    lower = jnp.concatenate([below, second], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


def _block_inverses(a: jax.Array, size: int) -> list[jax.Array]:
    """The inverses of the diagonal blocks of I + A, the last one smaller where `size` does not divide n."""
    n = a.shape[-1]
    whole = n // size
    blocks = jnp.stack([a[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(whole)])
    if size & (size - 1) == 0:
        inverses = list(invert_blocks(blocks))
    else:
        # One after the other: as one batch of products, under vmap, they abort XLA's CPU compiler (jaxlib 0.10.2).
        inverses = list(jax.lax.map(invert_unit_lower, blocks))
    if n % size:
        inverses.append(invert_unit_lower(a[whole * size :, whole * size :]))
    return inverses


def solve_unit_lower(a: jax.Array, b: jax.Array) -> jax.Array:
    """x with (I + A) x = b; `a` [n, n], only its strict lower triangle is read, `b` [n, m]. From the first block on."""
    n = a.shape[0]
    size = min(BLOCK, n)
    x = None
    for i, inverse in enumerate(_block_inverses(a, size)):
        rows = slice(i * size, min((i + 1) * size, n))
        rest = b[rows] if x is None else b[rows] - _matmul(a[rows, : i * size], x)
        solved = _matmul(inverse, rest)
        x = solved if x is None else jnp.concatenate([x, solved])
    return x


def solve_by_halves(a: jax.Array, b: jax.Array) -> jax.Array:
    """`solve_unit_lower` for any n under automatic differentiation: x₁ from the first half, x₂ from b₂ − A₂₁ x₁.

    Each level's slices of A have a gradient of n² numbers: log₂(n/BLOCK) such arrays, where n/BLOCK steps have as many.
    """
    n = a.shape[0]
    if n <= 2 * BLOCK:
        return solve_unit_lower(a, b)
    half = BLOCK * (n // (2 * BLOCK))
    first = solve_by_halves(a[:half, :half], b[:half])
    second = solve_by_halves(a[half:, half:], b[half:] - _matmul(a[half:, :half], first))
    return jnp.concatenate([first, second])


def solve_unit_lower_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """x with (I + A)ᵀ x = b; shapes as in `solve_unit_lower`. From the last block back."""
    n = a.shape[0]
    size = min(BLOCK, n)
    inverses = _block_inverses(a, size)
    x = None
    for i in reversed(range(len(inverses))):
        rows = slice(i * size, min((i + 1) * size, n))
        rest = b[rows] if x is None else b[rows] - _matmul(a[rows.stop :, rows].T, x)
        solved = _matmul(inverses[i].T, rest)
        x = solved if x is None else jnp.concatenate([solved, x])
    return x
