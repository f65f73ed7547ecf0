"""How much memory devices have."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterable

import jax
from jax.sharding import Mesh

# What `planned_memory` says.
_PLANNED: contextvars.ContextVar[int | None] = contextvars.ContextVar("planned memory of a device", default=None)
# What `agree_on_memory` says.
_AGREED: contextvars.ContextVar[int | None] = contextvars.ContextVar("least memory of all processes", default=None)


def agree_on_memory(limits: Iterable[int | None]) -> None:
    """From here on `memory_limit` is at most the least of `limits`, those of all processes of a run.

    What is compiled depends on it, and the processes must compile the same: their devices may have a little more or
    less memory, as where another program uses some.
    """
    _AGREED.set(min((limit for limit in limits if limit), default=None))


@contextlib.contextmanager
def planned_memory(limit: float):
    """In its body `memory_limit` is `limit` for devices that cannot say, since they are only compiled for.

    The compiled program is then the one that runs there: the training step makes pieces of logits by the memory.
    """
    token = _PLANNED.set(int(limit))
    try:
        yield
    finally:
        _PLANNED.reset(token)


def memory_limit(mesh: Mesh) -> int | None:
    """The bytes that JAX may use on the smallest of the mesh's devices that this process sees, or of all processes
    after `agree_on_memory`.

    None if they do not say: CPUs, and devices that are only compiled for, without `planned_memory`.
    """
    limits = limits_of(mesh.local_devices)
    own = min(limits) if limits else _PLANNED.get()
    return min(filter(None, (own, _AGREED.get())), default=None)


def limits_of(devices: Iterable[jax.Device]) -> list[int]:
    """The bytes that JAX may use on each of these devices; [] if one does not say."""
    try:
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    except jax.errors.JaxRuntimeError:
        return []
    return limits if all(limits) else []


def machine_bytes() -> int | None:
    """The memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
