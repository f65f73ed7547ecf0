"""Which rows of a global batch a process needs: those of the shards on its devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding


class LocalRows(NamedTuple):
    """The rows of a batch of `batch_size` that this process holds.

    numbers int [n]   their numbers in the global batch, ascending. Several processes hold the same ones if a mesh axis
                      that does not split rows, such as "tensor", crosses hosts.
    own bool [n]      those that this process counts: of the processes that hold a row, the one of the lowest index
    """

    batch_size: int
    numbers: np.ndarray
    own: np.ndarray


def local_rows(sharding: NamedSharding, batch_size: int, length: int) -> LocalRows | None:
    """The rows of a batch [batch_size, length] with this sharding that this process holds; None: it holds all of it."""
    if sharding.is_fully_addressable:
        return None
    holder = np.full(batch_size, np.iinfo(np.int64).max)
    mine = np.zeros(batch_size, bool)
    for device, (rows, *_) in sharding.devices_indices_map((batch_size, length)).items():
        holder[rows] = np.minimum(holder[rows], device.process_index)
        mine[rows] |= device.process_index == jax.process_index()
    (numbers,) = np.nonzero(mine)
    return LocalRows(batch_size, numbers, holder[numbers] == jax.process_index())


def to_devices(
    batch: dict[str, np.ndarray], sharding: NamedSharding, rows: LocalRows | None = None
) -> dict[str, jax.Array]:
    """Global arrays of a batch, of which this process gives its `rows`; None: all rows, of which it has every shard."""
    if rows is None:
        return jax.device_put(batch, sharding)

    def array(part: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            wanted = np.arange(rows.batch_size)[index[0]]
            return part[np.searchsorted(rows.numbers, wanted)][:, *index[1:]]

        return jax.make_array_from_callback((rows.batch_size, *part.shape[1:]), sharding, shard)

    return {name: array(part) for name, part in batch.items()}
