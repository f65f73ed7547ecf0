"""Halos: what looks back a few tokens gets them from the previous device.

    y_t depends on x_{t−n} … x_t       →       y = f([the previous device's last n tokens, x]) without its first n rows

It serves short convolutions (n = width − 1) and KV shifting (n = 1). A device sends n tokens, whatever T is.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.sharding.context.axis import CONTEXT_AXIS, from_previous, sequence_is_sharded


def over_previous_tokens(function: Callable, tokens: int, x, segment_ids: jax.Array | None):
    """function(x, segment_ids), by `over_halo` if the sequence is sharded over CONTEXT_AXIS."""
    if not sequence_is_sharded():
        return function(x, segment_ids)
    return over_halo(function, x, segment_ids, tokens, CONTEXT_AXIS)


def over_halo(function: Callable, x, segment_ids: jax.Array | None, tokens: int, axis_name: str):
    """function(x, segment_ids) of a sequence that is sharded over the mesh axis `axis_name`, inside shard_map.

    Args:
      function: (x, segment_ids [B, n + T/P]) -> arrays [B, n + T/P, ...], in which a token depends on itself and on at
        most `tokens` tokens before it, all of its own segment. For example
        `lambda x, ids: convolution(x, segment_ids=ids)[0]`.
      x: an array [B, T/P, ...], or a tree of them.
      segment_ids: [B, T/P] or None. A segment may begin on an earlier device.
      tokens: n.

    Returns function's arrays of the device's own tokens, [B, T/P, ...]. Raises ValueError if a device has fewer than n
    tokens: its halo would reach over two devices.
    """
    first = jax.tree.leaves(x)[0]
    if tokens == 0:
        return function(x, segment_ids)
    if first.shape[1] < tokens:
        raise ValueError(
            f"{first.shape[1]} tokens on each of the {lax.axis_size(axis_name)} devices of the mesh axis "
            f"{axis_name!r}, but a token looks back {tokens}: use longer sequences (data.sequence_length) or fewer "
            "devices (mesh.context)"
        )
    if segment_ids is None:
        segment_ids = jnp.ones(first.shape[:2], jnp.int32)
    given = (x, segment_ids)
    # The first device receives zeros: ids of padding, which nothing sees.
    halo = from_previous(jax.tree.map(lambda y: y[:, -tokens:], given), axis_name)
    longer = jax.tree.map(lambda before, y: jnp.concatenate([before, y], axis=1), halo, given)
    return jax.tree.map(lambda y: y[:, tokens:], function(*longer))
