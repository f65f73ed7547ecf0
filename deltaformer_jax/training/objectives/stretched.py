"""Positions of a short row stretched over a longer context, so that its tokens have distances of the longer one.

A row of L tokens becomes three parts of a row of T ≥ L: a head of h tokens at 0 … h − 1, a middle part of L − 2h tokens
that ends at position e, and a tail of h tokens at T − h … T − 1. h is ⌊L/3⌋ or min(4 ⌊T/L⌋, ⌊L/3⌋), each as likely, and

    uniform    e is drawn from L − h − 1 … T − h − 1
    cream      a half-integer a/2 is drawn, then e from h + (L − 2h − 1) a/2 … (a/2) L − h − 1. a is the normal
               distribution of mean 1 + T/L and deviation 5, moved into 2 … 2 T/L and rounded down

Positions grow strictly, for L ≥ 3 from 0 to T − 1; with T = L they are 0 … L − 1. Within a document of a packed row,
token p has the position of place p. Source: the published code of LongReD (Dong et al., arXiv 2502.07365), which takes
the second from CREAM (Wu et al., arXiv 2406.07138). There L divides T, h is the same for all rows of a batch, and
"uniform" leaves out e = L − h − 1, where nothing lies between head and middle.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_DEVIATION = 5.0


def stretched(key: jax.Array, rows: int, original: int, length: int, skip: str) -> jax.Array:
    """int32 [rows, original]: the position of each place of a row. skip: "uniform" or "cream"."""
    of_row = lambda key: _of_row(key, original, length, skip)
    return jax.vmap(of_row)(jax.random.split(key, rows))


def _of_row(key: jax.Array, original: int, length: int, skip: str) -> jax.Array:
    which, wide, where = jax.random.split(key, 3)
    third = original // 3
    short = min(4 * (length // original), third)
    head = jnp.where(jax.random.bernoulli(which), third, short)
    middle = original - 2 * head
    least, most = original - head - 1, length - head - 1
    if skip == "cream":
        least, most = _bounds(wide, original, length, head, middle, most)
    end = jax.random.randint(where, (), least, most + 1)
    place = jnp.arange(original)
    of_middle = place + (end + 1 - head - middle)
    of_tail = place + (length - original)
    return jnp.where(place < head, place, jnp.where(place < head + middle, of_middle, of_tail)).astype(jnp.int32)


def _bounds(key, original, length, head, middle, most):
    """The least and largest end of the middle part, cream's."""
    drawn = 1 + length / original + _DEVIATION * jax.random.normal(key)
    half = jnp.floor(jnp.clip(drawn, 2, 2 * length / original)) / 2
    least = jnp.floor(head + (middle - 1) * half).astype(jnp.int32)
    last = jnp.floor(half * original).astype(jnp.int32) - head - 1
    last = jnp.minimum(last, most)
    return jnp.minimum(least, last), last
