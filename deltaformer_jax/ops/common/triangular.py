"""(I + A)⁻¹ for strictly lower triangular A, by steps that never form a power of A.

The ladder doubles the size of the blocks that are already inverted: with X the inverse of I + (A inside its b-blocks)
and L_b the part of A inside the 2b-blocks but outside the b-blocks,

    X ← X − X L_b X,      b = 1, 2, 4, …

which is exact at each step, because [[M₁, 0], [L, M₂]]⁻¹ = [[X₁, 0], [−X₂ L X₁, X₂]]. The Neumann product
(I − A)(I + A²)(I + A⁴)… is as short, but cancels huge powers when keys are alike: for unit keys of mean cosine 0.9 and
128 rows it loses all digits in float32, where the ladder keeps seven (tests/ops/test_ops_triangular.py).

Up to 32 rows the ladder's products are masked and its steps a loop. The masks waste three quarters of the work or more,
which is little here, and what is not unrolled need not be compiled: on a CPU each product of small matrices in a
program takes XLA up to 0.4 s. From 32 rows to 64 the same step is taken on the halves alone. A larger system is solved
by substitution, 64 rows at a time, which costs less than its inverse and is as exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# Rows of a diagonal block that is inverted outright, and of those in it that the ladder inverts.
BLOCK = 64
_LADDER = 32

_HIGHEST = lax.Precision.HIGHEST


def _matmul(a, b):
    return jnp.matmul(a, b, precision=_HIGHEST)


def invert_unit_lower(a: jax.Array) -> jax.Array:
    """(I + A)⁻¹ by the ladder; `a` [..., n, n], its diagonal and upper triangle are not read.

    Cost: 2 ⌈log₂ n⌉ products of n×n matrices. Error: a few roundings times ‖(I+A)⁻¹‖, for any A.
    """
    n = a.shape[-1]
    row = lax.broadcasted_iota(jnp.int32, (n, n), 0)
    column = lax.broadcasted_iota(jnp.int32, (n, n), 1)

    def double(step, inverse):
        # Blocks have 2**step rows, and two of them are one where row and column have the same number without that bit.
        pair = (row >> step) ^ (column >> step)
        below = (pair == 1) & (row > column)
        part = jnp.where(jnp.broadcast_to(below, a.shape), a, jnp.zeros((), a.dtype))
        return inverse - _matmul(_matmul(inverse, part), inverse)

    # The first X is the identity, and its step A between neighbours.
    neighbours = (row == column + 1) & (row % 2 == 1)
    step = jnp.where(jnp.broadcast_to(neighbours, a.shape), a, jnp.zeros((), a.dtype))
    inverse = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape) - step
    return lax.fori_loop(1, (n - 1).bit_length(), double, inverse)


def invert_blocks(a):
    """(I + A)⁻¹ of m strictly lower triangular A [..., m, C, C], C a power of two; the rest of `a` is not read."""
    *lead, blocks, size, _ = a.shape
    if size <= _LADDER:
        return invert_unit_lower(a)
    half = size // 2
    diagonal = jnp.stack([a[..., :half, :half], a[..., half:, half:]], axis=-3)
    inverses = invert_blocks(diagonal.reshape(*lead, 2 * blocks, half, half))
    first, second = halves(inverses)
    return join_blocks(inverses, -_matmul(_matmul(second, a[..., half:, :half]), first))


def halves(x):
    """[..., 2m, ., .] -> two of [..., m, ., .]: the first and the second block of each pair."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def join_blocks(diagonal, below):
    """[..., 2m, b, b] and [..., m, b, b] -> [..., m, 2b, 2b]: [[first, 0], [below, second]] of each pair of blocks."""
    first, second = halves(diagonal)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    lower = jnp.concatenate([below, second], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


class _Blocks:
    """A system [..., n, n] in blocks of `size` rows, filled up with rows of the identity."""

    def __init__(self, a):
        self.rows = a.shape[-1]
        self.size = min(BLOCK, 1 << (self.rows - 1).bit_length())
        self.number = -(-self.rows // self.size)
        self.a = self._filled(a, columns=True)

    def _filled(self, x, columns):
        missing = self.number * self.size - self.rows
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, missing if columns else 0)])

    def right_hand_side(self, b):
        return self._filled(b, columns=False)

    def tile(self, i, j):
        return self.take(lax.dynamic_slice_in_dim(self.a, j * self.size, self.size, -1), i)

    def inverses(self):
        """Of the blocks on the diagonal, [..., number, size, size]."""
        if self.number == 1:
            return invert_blocks(self.a[..., None, :, :])
        grid = self.a.reshape(*self.a.shape[:-2], self.number, self.size, self.number, self.size)
        return invert_blocks(jnp.moveaxis(jnp.diagonal(grid, axis1=-4, axis2=-2), -1, -3))

    def take(self, x, i):
        return lax.dynamic_slice_in_dim(x, i * self.size, self.size, -2)

    def put(self, x, part, i):
        return lax.dynamic_update_slice_in_dim(x, part, i * self.size, -2)


def solve_unit_lower(a: jax.Array, b: jax.Array) -> jax.Array:
    """x with (I + A) x = b; `a` [..., n, n], only its strict lower triangle is read, `b` [..., n, m].

    From the first block on. Not differentiable in reverse, as loops of unknown length are not; `solve_by_halves` is.
    """
    system = _Blocks(a)
    b, inverses = system.right_hand_side(b), system.inverses()

    def block(i, x):
        subtract = lambda j, rest: rest - _matmul(system.tile(i, j), system.take(x, j))
        rest = lax.fori_loop(0, i, subtract, system.take(b, i))
        return system.put(x, _matmul(lax.dynamic_index_in_dim(inverses, i, -3, keepdims=False), rest), i)

    return lax.fori_loop(0, system.number, block, b)[..., : system.rows, :]


def solve_unit_lower_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """x with (I + A)ᵀ x = b; shapes as in `solve_unit_lower`, nor differentiable either. From the last block back."""
    system = _Blocks(a)
    b, inverses = system.right_hand_side(b), system.inverses()

    def block(step, x):
        i = system.number - 1 - step
        subtract = lambda j, rest: rest - _matmul(system.tile(j, i).mT, system.take(x, j))
        rest = lax.fori_loop(i + 1, system.number, subtract, system.take(b, i))
        return system.put(x, _matmul(lax.dynamic_index_in_dim(inverses, i, -3, keepdims=False).mT, rest), i)

    return lax.fori_loop(0, system.number, block, b)[..., : system.rows, :]


def solve_by_halves(a: jax.Array, b: jax.Array) -> jax.Array:
    """`solve_unit_lower` under automatic differentiation: x₁ from the first half, x₂ from b₂ − A₂₁ x₁.

    Each level's slices of A have a gradient of n² numbers: log₂(n/BLOCK) such arrays, where n/BLOCK steps have as many.
    """
    system = _Blocks(a)
    inverses, size = system.inverses(), system.size

    def solve(first, last, b):
        """The blocks first to last - 1, of right-hand side b."""
        if last - first == 1:
            return _matmul(inverses[..., first, :, :], b)
        middle = (first + last) // 2
        rows = (middle - first) * size
        x = solve(first, middle, b[..., :rows, :])
        below = system.a[..., middle * size : last * size, first * size : middle * size]
        rest = b[..., rows:, :] - _matmul(below, x)
        return jnp.concatenate([x, solve(middle, last, rest)], axis=-2)

    return solve(0, system.number, system.right_hand_side(b))[..., : system.rows, :]
