"""What the kernels for TPU take, and what they may take of a core's VMEM."""

from __future__ import annotations

DTYPES = ("bfloat16", "float32")
WIDEST = 256
# Of 64 MiB, the least that a core of the generations these kernels are compiled for has (v5p, 7x); and what arrays of
# all rows may take of it, the rest being tiles'.
VMEM_BYTES = 60 * 2**20
RESIDENT_BYTES = 32 * 2**20


def lacks(key, value) -> str | None:
    """Why the kernels cannot do a call with these keys and values [B,T,heads,W], or None."""
    if str(key.dtype) not in DTYPES or key.dtype != value.dtype:
        return f"its kernels take one dtype of {', '.join(DTYPES)}; key is {key.dtype} and value {value.dtype}"
    if max(key.shape[3], value.shape[3]) > WIDEST:
        return f"its kernels take widths up to {WIDEST}; keys have {key.shape[3]} and values {value.shape[3]}"
    return None
