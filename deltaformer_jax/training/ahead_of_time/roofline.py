"""The least time of a training step on devices that are not at hand.

    arithmetic     FLOPs of a device, what is computed again included / its peak
    memory         bytes that its launches read and write / its memory's bandwidth
    communication  sum over mesh axes: bytes that it sends along the axis / the bandwidth of the links of that axis

Everything at once takes the longest of the three, and one after another their sum: a real step lies between, if each
part reaches its peak.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from deltaformer_jax.compiled.collectives import Collective
from deltaformer_jax.training.ahead_of_time.topologies import Topology


class Sent(NamedTuple):
    """What a device sends along mesh axes in a step: for one kind of collective, in one set of axes."""

    axes: tuple[str, ...]
    kind: str
    bytes: int
    seconds: float


class Roofline(NamedTuple):
    """Seconds of a step."""

    arithmetic: float
    memory: float
    communication: float

    @property
    def overlapped(self) -> float:
        return max(self)

    @property
    def in_turn(self) -> float:
        return sum(self)

    @property
    def bound(self) -> str:
        return self._fields[int(np.argmax(self))]


def sent(collectives: Iterable[Collective], mesh: Mesh, topology: Topology) -> list[Sent]:
    """A row for each kind of collective and set of mesh axes, the slowest first."""
    rows: dict[tuple, int] = {}
    for x in collectives:
        axes = axes_of(x.members, mesh)
        if axes:
            rows[axes, x.kind] = rows.get((axes, x.kind), 0) + x.turns * x.sent
    found = [Sent(axes, kind, size, size / axes_bandwidth(axes, mesh, topology)) for (axes, kind), size in rows.items()]
    return sorted(found, key=lambda row: -row.seconds)


def axes_of(members: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which a group of devices, numbered in the mesh's order, differ."""
    places = np.unravel_index(np.array(members), mesh.devices.shape)
    return tuple(name for name, place in zip(mesh.axis_names, places) if len(set(place.tolist())) > 1)


def axes_bandwidth(axes: tuple[str, ...], mesh: Mesh, topology: Topology) -> float:
    """Bytes a second that a device sends to the devices that differ from it along `axes` only.

    The links of all dimensions of the slice along which these devices lie are used. If some of them are in another
    slice, or cards in another host, the network is what they wait for.
    """
    chip, share = topology.chip, topology.devices_per_chip
    picked = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    group = np.asarray(mesh.devices[picked]).flatten().tolist()
    of_network = "process_index" if topology.of_cards else "slice_index"
    if len({getattr(device, of_network, 0) for device in group}) > 1:
        return chip.network / share
    if topology.of_cards:
        return chip.link
    places = np.array([device.coords[: len(topology.shape)] for device in group])
    sizes = [len(set(column.tolist())) for column in places.T]
    rings = sum(
        1.0 if used == size and size % chip.wraps == 0 else 0.5 for size, used in zip(topology.shape, sizes) if used > 1
    )
    # Two devices of one chip, which differ in no dimension, exchange by the chip itself, faster than by one link.
    return chip.link * (rings or 1.0) / share
