"""What the processes of a run agree on between two steps: that one of them was asked to stop, that it is time to save.

A signal reaches one host, and clocks differ. If one process acted on them alone, the others would wait for it in the
next collective for ever. So each process votes before every step, and acts on the result of the vote before: by then
the devices have computed it, as they have the metrics that are read one step late, and nobody waits. A vote is the
maximum over all devices of a few numbers.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltaformer_jax.processes import child


class Stop(Protocol):
    @property
    def requested(self) -> bool: ...


class Alone:
    """One process, which need not ask anyone: `requested` is the Interruption's, `overdue` its own clock's."""

    def __init__(self, stop: Stop):
        self._stop, self.overdue = stop, False

    @property
    def requested(self) -> bool:
        return self._stop.requested

    def vote(self, overdue: bool = False) -> None:
        self.overdue = overdue

    def ask(self) -> bool:
        return self.requested


class Together:
    """Several processes. All must call `vote` equally often and in the same order among what they give the devices."""

    def __init__(self, stop: Stop, mesh: Mesh):
        self._stop = stop
        devices = np.asarray(mesh.devices).reshape(-1)
        whole = Mesh(devices, ("devices",))
        self._cut = NamedSharding(whole, PartitionSpec("devices"))
        self._shape = (devices.size, 2)
        self._maximum = jax.jit(functools.partial(jnp.max, axis=0), out_shardings=NamedSharding(whole, PartitionSpec()))
        self._running: Any = None
        self.requested = self.overdue = False

    def vote(self, overdue: bool = False) -> None:
        """Take in the result of the vote before, then vote. `requested` stays True once it is."""
        # The first vote is compiled, and may be the first meeting of the devices of all hosts.
        with child.taking_time("waiting for the other processes"):
            if self._running is None:
                self._running = self._begin(overdue)
            stop, late = np.asarray(self._running)
            self._running = self._begin(overdue)
        self.requested, self.overdue = self.requested or bool(stop), bool(late)

    def ask(self) -> bool:
        """Vote, for a loop that has nothing else to decide. Returns `requested`."""
        self.vote()
        return self.requested

    def _begin(self, overdue: bool) -> jax.Array:
        mine = np.array([[self._stop.requested, overdue]], np.int32)
        return self._maximum(jax.make_array_from_callback(self._shape, self._cut, lambda _: mine))


def agreement(stop: Stop, mesh: Mesh) -> Alone | Together:
    return Alone(stop) if jax.process_count() == 1 else Together(stop, mesh)
