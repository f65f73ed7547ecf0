"""How a step's solved blocks reach all devices, and how sums over devices reach the devices that solved the blocks.

Of g groups, at most g devices have solved a block. With a slot for each of the P devices, an all-gather sends P slots,
P/g times as much as there is; with a slot for each group, an all-reduce sends the g blocks twice. The smaller is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Turn(NamedTuple):
    """A device's turn in a step: it solves its own block i of group j, if `live`."""

    j: jax.Array
    i: jax.Array
    live: jax.Array


class Exchange:
    """The exchange of a chain with `groups` groups over the mesh axis `axis_name` of `devices` devices."""

    def __init__(self, axis_name: str, devices: int, groups: int):
        self.axis_name, self.devices, self.groups = axis_name, devices, groups
        self.by_group = 2 * groups < devices
        self.slots = groups if self.by_group else devices

    def slot(self, j, number):
        """The slot of the block `number` of group j."""
        return j if self.by_group else number % self.devices

    def to_all(self, message, turn: Turn):
        """Arrays [slots, ...] with the messages of all devices, a tree of arrays each, in the slots of their blocks."""
        if not self.by_group:
            return jax.tree.map(lambda x: lax.all_gather(x, self.axis_name), message)

        def gather(x):
            empty = jnp.zeros_like(x, shape=(self.slots, *x.shape))
            own = lax.dynamic_update_index_in_dim(empty, jnp.where(turn.live, x, jnp.zeros_like(x)), turn.j, 0)
            return lax.psum(own, self.axis_name)

        return jax.tree.map(gather, message)

    def to_owner(self, parts, turn: Turn):
        """The sum over devices of parts [slots, ...], in the slot of this device's turn; 0 if it has none."""
        if not self.by_group:
            return jax.tree.map(lambda x: lax.psum_scatter(x, self.axis_name), parts)

        def own(x):
            mine = lax.dynamic_index_in_dim(lax.psum(x, self.axis_name), turn.j, keepdims=False)
            return jnp.where(turn.live, mine, jnp.zeros_like(mine))

        return jax.tree.map(own, parts)
