"""Solves and inverts I + A for strictly lower triangular A, by steps that never form a power of A.

The ladder doubles the size of the blocks that are already inverted. Let X be the inverse of I + (A inside its b×b
diagonal blocks), and L_b the part of A inside the 2b×2b diagonal blocks but outside the b×b ones. Then

    X ← X − X L_b X,      b = 1, 2, 4, …

Each step is exact, because [[M₁, 0], [L, M₂]]⁻¹ = [[X₁, 0], [−X₂ L X₁, X₂]]. The Neumann product
(I − A)(I + A²)(I + A⁴)… takes as few steps, but if the keys are similar its terms are huge and cancel. For unit keys of
mean cosine 0.9 and 128 rows, the Neumann product loses all digits in float32 and the ladder keeps seven
(tests/ops/test_ops_triangular.py).

Up to 32 rows, the ladder runs as a loop over masked full-size products. The masks waste three quarters of the work or
more, which is little at this size. In return the compiler sees one step instead of all of them: on a CPU, XLA takes up
to 0.4 s to compile each product of small matrices in a program. From 32 to 64 rows, the step uses the two halves only,
without masks. A larger system is solved by block substitution, 64 rows at a time. That costs less than an inverse and
is as exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# Rows of the diagonal blocks that are inverted; rows of the blocks inside them that the masked ladder inverts.
BLOCK = 64
_LADDER = 32

_HIGHEST = lax.Precision.HIGHEST


def _matmul(a, b):
    return jnp.matmul(a, b, precision=_HIGHEST)


def invert_unit_lower(a: jax.Array) -> jax.Array:
    """(I + A)⁻¹ by the ladder. `a` is [..., n, n]; its diagonal and upper triangle are not read.

    Cost: 2 ⌈log₂ n⌉ products of n×n matrices. Error: a few roundings times ‖(I+A)⁻¹‖, for any A.
    """
    n = a.shape[-1]
    row = lax.broadcasted_iota(jnp.int32, (n, n), 0)
    column = lax.broadcasted_iota(jnp.int32, (n, n), 1)

    def double(step, inverse):
        # Blocks have 2**step rows. A row and a column lie in the two different blocks of a pair if their block numbers
        # differ in the lowest bit only.
        pair = (row >> step) ^ (column >> step)
        below = (pair == 1) & (row > column)
        part = jnp.where(jnp.broadcast_to(below, a.shape), a, jnp.zeros((), a.dtype))
        return inverse - _matmul(_matmul(inverse, part), inverse)

    # From X = I, the first step (b = 1) gives I minus the entries of A inside the 2×2 blocks.
    neighbours = (row == column + 1) & (row % 2 == 1)
    step = jnp.where(jnp.broadcast_to(neighbours, a.shape), a, jnp.zeros((), a.dtype))
    inverse = jnp.broadcast_to(jnp.eye(n, dtype=a.dtype), a.shape) - step
    return lax.fori_loop(1, (n - 1).bit_length(), double, inverse)


def invert_blocks(a):
    """(I + A)⁻¹ of m blocks, `a` [..., m, C, C], C a power of two. Only the strict lower triangles are read."""
    *lead, blocks, size, _ = a.shape
    if size <= _LADDER:
        return invert_unit_lower(a)
    half = size // 2
    diagonal = jnp.stack([a[..., :half, :half], a[..., half:, half:]], axis=-3)
    inverses = invert_blocks(diagonal.reshape(*lead, 2 * blocks, half, half))
    first, second = halves(inverses)
    return join_blocks(inverses, -_matmul(_matmul(second, a[..., half:, :half]), first))


def halves(x):
    """[..., 2m, ., .] -> two arrays [..., m, ., .]: the first and the second block of each pair."""
    return x[..., 0::2, :, :], x[..., 1::2, :, :]


def join_blocks(diagonal, below):
    """[..., 2m, b, b] and [..., m, b, b] -> [..., m, 2b, 2b]: [[first, 0], [below, second]] of each pair of blocks."""
    first, second = halves(diagonal)
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    lower = jnp.concatenate([below, second], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)


class _Blocks:
    """A system I + A, A [..., n, n], cut into blocks of `size` rows. A is padded with zeros to whole blocks."""

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
        """The inverses of the diagonal blocks, [..., number, size, size]."""
        if self.number == 1:
            return invert_blocks(self.a[..., None, :, :])
        grid = self.a.reshape(*self.a.shape[:-2], self.number, self.size, self.number, self.size)
        return invert_blocks(jnp.moveaxis(jnp.diagonal(grid, axis1=-4, axis2=-2), -1, -3))

    def take(self, x, i):
        return lax.dynamic_slice_in_dim(x, i * self.size, self.size, -2)

    def put(self, x, part, i):
        return lax.dynamic_update_slice_in_dim(x, part, i * self.size, -2)


def solve_unit_lower(a: jax.Array, b: jax.Array) -> jax.Array:
    """x with (I + A) x = b, by forward block substitution. `a` [..., n, n], of which only the strict lower triangle is
    read; `b` [..., n, m].

    JAX cannot differentiate this function in reverse mode, because its inner loop has no static length.
    `solve_by_halves` can be differentiated.
    """
    system = _Blocks(a)
    b, inverses = system.right_hand_side(b), system.inverses()

    def block(i, x):
        subtract = lambda j, rest: rest - _matmul(system.tile(i, j), system.take(x, j))
        rest = lax.fori_loop(0, i, subtract, system.take(b, i))
        return system.put(x, _matmul(lax.dynamic_index_in_dim(inverses, i, -3, keepdims=False), rest), i)

    return lax.fori_loop(0, system.number, block, b)[..., : system.rows, :]


def solve_unit_lower_transposed(a: jax.Array, b: jax.Array) -> jax.Array:
    """x with (I + A)ᵀ x = b, by backward block substitution. Shapes as in `solve_unit_lower`; like it, this function
    has no reverse-mode derivative."""
    system = _Blocks(a)
    b, inverses = system.right_hand_side(b), system.inverses()

    def block(step, x):
        i = system.number - 1 - step
        subtract = lambda j, rest: rest - _matmul(system.tile(j, i).mT, system.take(x, j))
        rest = lax.fori_loop(i + 1, system.number, subtract, system.take(b, i))
        return system.put(x, _matmul(lax.dynamic_index_in_dim(inverses, i, -3, keepdims=False).mT, rest), i)

    return lax.fori_loop(0, system.number, block, b)[..., : system.rows, :]


def solve_by_halves(a: jax.Array, b: jax.Array) -> jax.Array:
    """`solve_unit_lower` by recursive halves, which JAX can differentiate: x₁ from the first half, x₂ from b₂ − A₂₁ x₁.

    JAX's gradient of a slice of A is an array of n² numbers. Halving needs log₂(n/BLOCK) such arrays, one per level; a
    loop over blocks would need n/BLOCK.
    """
    system = _Blocks(a)
    inverses, size = system.inverses(), system.size

    def solve(first, last, b):
        """The solution's rows of blocks first … last − 1, for their part b of the right-hand side."""
        if last - first == 1:
            return _matmul(inverses[..., first, :, :], b)
        middle = (first + last) // 2
        rows = (middle - first) * size
        x = solve(first, middle, b[..., :rows, :])
        below = system.a[..., middle * size : last * size, first * size : middle * size]
        rest = b[..., rows:, :] - _matmul(below, x)
        return jnp.concatenate([x, solve(middle, last, rest)], axis=-2)

    return solve(0, system.number, system.right_hand_side(b))[..., : system.rows, :]
