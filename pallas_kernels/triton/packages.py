"""Checks whether the packages that the Triton kernels need are installed, without importing them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

# launch.py uses the interface of jax-triton 0.3; that of 0.4 is different.
JAX_TRITON = "0.3."
# The same as in pyproject.toml. The error names packages, so that it is right however this package was installed.
REQUIREMENTS = "'triton>=3.6,<3.7' 'jax-triton>=0.3.1,<0.4' 'jax[cuda12]>=0.10.2'"


@functools.cache
def missing() -> str | None:
    """A sentence that says what must be installed before a JAX program can contain a kernel; None if nothing is
    missing."""
    here = lambda *names: any(importlib.util.find_spec(name) is not None for name in names)
    # jax-triton uses a library of JAX's CUDA plugin to describe its calls, and cannot be imported without it.
    needed = {
        "triton": here("triton"),
        "jax-triton": here("jax_triton"),
        "JAX's CUDA plugin": here("jax_cuda12_plugin", "jax_cuda13_plugin"),
    }
    absent = [name for name, is_here in needed.items() if not is_here]
    if absent:
        return (
            f"it needs {' and '.join(absent)}: on Linux, pip install (or uv pip install) {REQUIREMENTS}; these are the "
            "packages of the extras cuda and triton"
        )
    version = importlib.metadata.version("jax-triton")
    if not version.startswith(JAX_TRITON):
        return f"it needs jax-triton {JAX_TRITON}x; {version} is installed"
    return None
