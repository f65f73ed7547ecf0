"""Limits of the TPU kernels: dtypes, head dimensions, and how much of a core's VMEM they may use."""

from __future__ import annotations

from jax.experimental.pallas import tpu as pltpu

DTYPES = ("bfloat16", "float32")
WIDEST = 256
# VMEM_BYTES: what a kernel may use of the core's VMEM, which is 64 MiB or more in all generations that these kernels
# are compiled for (64 MiB in v5p and 7x; v4 has 16). RESIDENT_BYTES: the part for arrays of all rows; the rest is for
# tiles.
VMEM_BYTES = 60 * 2**20
RESIDENT_BYTES = 32 * 2**20


def lacks(key, value) -> str | None:
    """Why the kernels do not support a call with these keys and values [B,T,heads,W], or None if they do."""
    if str(key.dtype) not in DTYPES or key.dtype != value.dtype:
        return f"its kernels take one dtype of {', '.join(DTYPES)}; key is {key.dtype} and value is {value.dtype}"
    if max(key.shape[3], value.shape[3]) > WIDEST:
        return f"its kernels take head dimensions up to {WIDEST}; keys have {key.shape[3]} and values {value.shape[3]}"
    # A program for a TPU that is not known yet, as `jax.export` makes it, has the kernels.
    if pltpu.is_tpu_device() and (vmem := pltpu.get_tpu_info().vmem_capacity_bytes) < VMEM_BYTES:
        return f"its kernels use up to {VMEM_BYTES >> 20} MiB of a core's VMEM; this TPU has {vmem >> 20} MiB"
    return None
