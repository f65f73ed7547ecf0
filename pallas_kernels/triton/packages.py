"""Whether the packages that these kernels need are here, asked without importing them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

# The interface of jax-triton that launch.py speaks; 0.4 has another.
JAX_TRITON = "0.3."


@functools.cache
def missing() -> str | None:
    """What has to be installed before a kernel can be part of a JAX program, in a sentence; None: nothing."""
    here = lambda *names: any(importlib.util.find_spec(name) is not None for name in names)
    # jax-triton describes its calls with a library of JAX's CUDA plugin, and does not import without it.
    needed = {
        "triton": here("triton"),
        "jax-triton": here("jax_triton"),
        "JAX's CUDA plugin": here("jax_cuda12_plugin", "jax_cuda13_plugin"),
    }
    absent = [name for name, is_here in needed.items() if not is_here]
    if absent:
        return (
            f"it needs {' and '.join(absent)}: on Linux install the extras cuda and triton "
            "(pip install 'deltaformer-jax[cuda,triton]'), or in a clone the dependency group kernels"
        )
    version = importlib.metadata.version("jax-triton")
    if not version.startswith(JAX_TRITON):
        return f"it needs jax-triton {JAX_TRITON}x; {version} is installed"
    return None
