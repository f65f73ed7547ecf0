"""Preparation of every mixer's input: zero the padding, and derive positions."""

from __future__ import annotations

import jax.numpy as jnp

from deltaformer_jax import ops
from deltaformer_jax.ops.common.rematerialisation import kept
from deltaformer_jax.sharding import CONTEXT_AXIS, of_whole_rows, sequence_is_sharded
from deltaformer_jax.sharding.activations import constrain


def clear_padding(x, segment_ids):
    """x [B,T,D] with zeros where `segment_ids` [B,T] is 0.

    The content of padding, NaN included, then reaches neither a value nor a gradient. Masking the output alone would
    not do: a kernel's gradient sums over all tokens, and 0 · NaN is NaN.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be [batch, length, d_model]; its shape is {x.shape}")
    if segment_ids is None:
        return kept(x)
    if segment_ids.shape != x.shape[:2]:
        raise ValueError(f"segment_ids must be [batch, length] = {x.shape[:2]}; its shape is {segment_ids.shape}")
    real = constrain(segment_ids != 0, "batch", "stream")
    return kept(jnp.where(real[:, :, None], x, 0))


def default_positions(x, segment_ids, cache):
    """int32 [B,T]: each token's index among the real tokens of its segment, counted on from the tokens in `cache`."""
    start = None if cache is None else cache.length
    return token_positions(segment_ids, *x.shape[:2], start)


def token_positions(segment_ids, batch, length, start=None):
    """`ops.token_positions`, int32 [batch, length], also of a sequence that is sharded over devices."""
    if not sequence_is_sharded():
        return ops.token_positions(segment_ids, batch, length, start)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    positions = lambda ids: ops.token_positions(ids, *ids.shape)
    return of_whole_rows(positions, segment_ids, CONTEXT_AXIS)
