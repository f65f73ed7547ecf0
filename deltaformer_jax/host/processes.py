"""The index and number of a run's processes. jax, which is slow to import, is asked only if there may be several.

There can be several processes in two cases: jax.distributed was initialised, so jax is imported already; or the machine
has TPUs, whose hosts form one system without jax.distributed.
"""

from __future__ import annotations

import glob
import sys

TPUS = ("/dev/accel*", "/dev/vfio/[0-9]*")


def index() -> int:
    """jax.process_index(), or 0 without importing jax."""
    if _is_surely_alone():
        return 0
    import jax

    return jax.process_index()


def count() -> int:
    """jax.process_count(), or 1 without importing jax."""
    if _is_surely_alone():
        return 1
    import jax

    return jax.process_count()


def has_tpus() -> bool:
    return any(map(glob.glob, TPUS))


def _is_surely_alone() -> bool:
    return "jax" not in sys.modules and not has_tpus()
