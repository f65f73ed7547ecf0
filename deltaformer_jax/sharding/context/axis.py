"""One mesh axis that shards sequences: device p of P holds tokens p·T/P … (p+1)·T/P − 1 of each row.

All functions here run inside `jax.shard_map`, on one device's part. `name` is the mesh axis.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common.checks import renumbered

# The mesh axis over which training shards sequences.
CONTEXT_AXIS = "context"


def sequence_is_sharded() -> bool:
    """Whether this is traced inside a shard_map over the devices of CONTEXT_AXIS, so that each has its own tokens."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and CONTEXT_AXIS in mesh.manual_axes and mesh.shape[CONTEXT_AXIS] > 1


def of_whole_rows(function: Callable, segment_ids: jax.Array, name: str) -> jax.Array:
    """This device's part of function(segment_ids) [B, T], computed from all devices' ids. It sends B T integers."""
    tokens = segment_ids.shape[1]
    whole = function(whole_rows(segment_ids, name))
    return lax.dynamic_slice_in_dim(whole, lax.axis_index(name) * tokens, tokens, axis=1)


def from_previous(tree, name: str):
    """The previous device's arrays; zeros on the first device."""
    forward = [(i, i + 1) for i in range(lax.axis_size(name) - 1)]
    return jax.tree.map(lambda x: lax.ppermute(x, name, forward), tree)


def rotated(tree, name: str, by: int = 1):
    """The arrays of the device `by` places before, around the ring."""
    devices = lax.axis_size(name)
    around = [(i, (i + by) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, name, around), tree)


def whole_rows(x, name: str):
    """x [B, T/P, ...] of all devices: [B, T, ...]; None stays None."""
    return None if x is None else lax.all_gather(x, name, axis=1, tiled=True)


def narrow_ids(segment_ids, name: str):
    """Ids in at most 32 bits, as `checks.as_segment_ids` makes them, but numbered alike on all devices."""
    if segment_ids is None or segment_ids.dtype.itemsize <= 4:
        return segment_ids
    return of_whole_rows(renumbered, segment_ids, name)


def previous_ids(segment_ids, name: str):
    """(the id of the token before this device's first one [B], whether any token of an earlier device is real [B]).

    On the first device they are 0 and False. segment_ids is [B, T/P].
    """
    here = jnp.stack([segment_ids[:, -1], jnp.any(segment_ids != 0, axis=1).astype(segment_ids.dtype)])
    before = from_previous(here[0], name)
    all_real = lax.all_gather(here[1], name)  # [P, B]
    earlier = jnp.arange(all_real.shape[0]) < lax.axis_index(name)
    return before, jnp.any((all_real != 0) & earlier[:, None], axis=0)
