"""The code that a process runs, so that the processes of a run can compare theirs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy")
_ROOT = Path(__file__).parents[2]


def code() -> dict[str, str]:
    """Versions of Python and of what computes, and the SHA-256 of this project's own files."""
    digest = hashlib.sha256()
    for package in ("deltaformer_jax", "pallas_kernels"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT).as_posix()}\0".encode() + path.read_bytes())
    versions = {f"version of {name}": _version(name) for name in PACKAGES}
    return {"version of Python": platform.python_version(), **versions, "hash of the code": digest.hexdigest()[:12]}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none: it is not installed"
