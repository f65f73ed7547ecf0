"""Form: everything that a DeltaFormer kernel is compiled for, except its tile. It is the constant FORM in all kernels
and their functions."""

from __future__ import annotations

import dataclasses

import numpy as np

from pallas_kernels.triton.memory import Layout


def operands(kappa, dtype) -> str:
    """How matrix products with the weights of the similarity `kappa` take their float32 operands.

    "narrow": rounded to the arrays' two-byte dtype; for softmax, whose rows are averages. "pair": as two bfloat16 parts
    (split_products.py); for other similarities between bfloat16 arrays. "exact": as they are; between float32 arrays.
    """
    if np.dtype(dtype).itemsize == 4:
        return "exact"
    return "narrow" if kappa.name == "softmax" else "pair"


@dataclasses.dataclass(frozen=True)
class Form:
    """Everything about a call that its kernels are compiled for, except tiles.

    heads: heads of the kernel's query: q for a read, w for a write. u_heads: heads of u; for a write the same as heads.
    kv_heads: heads of keys and values. key_width, value_width: K and V. similarity: "linear", "relu", "exp", "softmax"
    or "round". power: 10 to the number of decimals of "round". operands: see the function `operands`. tied: one softmax
    writes and reads. has_…: the optional array is present. wide_u: a later launch takes u in float32, so that the write
    stores it.
    """

    heads: int
    u_heads: int
    kv_heads: int
    key_width: int
    value_width: int
    similarity: str
    power: float
    operands: str
    tied: bool = False
    has_alpha: bool = False
    has_beta: bool = False
    has_segments: bool = False
    wide_u: bool = True

    @property
    def queries(self) -> Layout:
        """Layout of q, w and their gradients: [B, T, heads, K]."""
        return Layout(self.heads, self.key_width)

    @property
    def keys(self) -> Layout:
        """Layout of k: [B, T, kv_heads, K]."""
        return Layout(self.kv_heads, self.key_width)

    @property
    def values(self) -> Layout:
        """Layout of v: [B, T, kv_heads, V]."""
        return Layout(self.kv_heads, self.value_width)

    @property
    def u(self) -> Layout:
        """Layout of u and of arrays of its shape: [B, T, u_heads, V]."""
        return Layout(self.u_heads, self.value_width)

    @property
    def out(self) -> Layout:
        """Layout of out and its gradient: [B, T, heads, V]."""
        return Layout(self.heads, self.value_width)

    @property
    def key_gradients(self) -> Layout:
        """Layout of dk before the sum over heads that share a key head: [B, T, u_heads, K]."""
        return Layout(self.u_heads, self.key_width)

    @property
    def softmax(self) -> bool:
        return self.similarity == "softmax"

    @property
    def narrow(self) -> bool:
        return self.operands == "narrow"

    @property
    def pair(self) -> bool:
        return self.operands == "pair"

    @property
    def exact(self) -> bool:
        return self.operands == "exact"

    @property
    def has_summary(self) -> bool:
        """Whether the write stores s. dβ = −G·s needs it, and it cannot be recovered from u = α v − β s if β is 0."""
        return self.tied or self.has_beta

    @property
    def score_precision(self) -> str:
        """Triton's input_precision for products of float32 queries and keys. It has no effect on two-byte operands."""
        return "tf32x3"

    @property
    def precision(self) -> str:
        """Triton's input_precision for products of float32 values in registers. It matches the precision of the other
        products (`operands`)."""
        return {"narrow": "tf32", "pair": "bf16x3", "exact": "tf32x3"}[self.operands]
