"""What all Triton kernels support: dtypes and head dimensions."""

from __future__ import annotations

DTYPES = ("bfloat16", "float16", "float32")
WIDTHS = (64, 128, 256)  # each is the largest head dimension of an entry of the tables of tiles
WIDEST = WIDTHS[-1]


def unsupported(key, value) -> str | None:
    """Why the kernels do not support keys and values of these dtypes and head dimensions, or None if they do."""
    if str(key.dtype) not in DTYPES or key.dtype != value.dtype:
        return f"its kernels take one dtype of {', '.join(DTYPES)}; key is {key.dtype} and value is {value.dtype}"
    if max(key.shape[3], value.shape[3]) > WIDEST:
        return f"its kernels take head dimensions up to {WIDEST}; keys have {key.shape[3]} and values {value.shape[3]}"
    return None
