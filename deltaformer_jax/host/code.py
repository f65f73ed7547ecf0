"""The code that a process runs, and what its environment says of it, so that the processes of a run can compare."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy"),
    # Where one is missing, an op takes another form.
    *("triton", "jax-triton", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
)
# Variables that change the compiled programs: with other values the processes of a run would not meet in collectives,
# or would compute other numbers.
VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "JAX_ENABLE_X64",
    "JAX_DEFAULT_MATMUL_PRECISION",
    "JAX_DEFAULT_PRNG_IMPL",
    "JAX_THREEFRY_PARTITIONABLE",
    "JAX_DEBUG_NANS",
    "JAX_DISABLE_JIT",
)
_DUMPS = "--xla_dump"  # where XLA writes what it compiles: a process may have its own folder
_ROOT = Path(__file__).parents[2]


def code() -> dict[str, str]:
    """Versions of Python and of what computes, and the SHA-256 of this project's own files."""
    digest = hashlib.sha256()
    for package in ("deltaformer_jax", "pallas_kernels"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT).as_posix()}\0".encode() + path.read_bytes())
    versions = {f"version of {name}": _version(name) for name in PACKAGES}
    return {"version of Python": platform.python_version(), **versions, "hash of the code": digest.hexdigest()[:12]}


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Those of VARIABLES, "" if they are not set, without the flags that say what XLA dumps."""
    flags = {name: environ.get(name, "").split() for name in VARIABLES}
    return {f"${name}": " ".join(one for one in words if not one.startswith(_DUMPS)) for name, words in flags.items()}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none: it is not installed"
