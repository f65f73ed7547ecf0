"""Whether the packages that these kernels need are here, asked without importing them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

# The interface of jax-triton that launch.py speaks; 0.4 has another.
JAX_TRITON = "0.3."
# As in pyproject.toml, for an error that is right however this package was installed.
REQUIREMENTS = "'triton>=3.6,<3.7' 'jax-triton>=0.3.1,<0.4' 'jax[cuda12]>=0.10.2'"


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
            f"it needs {' and '.join(absent)}: on Linux, pip install (or uv pip install) {REQUIREMENTS}, which are the "
            "extras cuda and triton"
        )
    version = importlib.metadata.version("jax-triton")
    if not version.startswith(JAX_TRITON):
        return f"it needs jax-triton {JAX_TRITON}x; {version} is installed"
    return None
