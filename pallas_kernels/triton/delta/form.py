"""What a kernel knows while it is compiled, but for its tile, as one constant: FORM in every kernel and step."""

from __future__ import annotations

import dataclasses

import numpy as np

from pallas_kernels.triton.memory import Layout


def operands(kappa, dtype) -> str:
    """How products with the weights of the similarity `kappa` take float32 operands.

    "narrow": rounded to the arrays' two bytes, by softmax, whose rows are averages; "pair": as two bfloat16 parts
    (split_products.py), by other weights between bfloat16 arrays; "exact": as they are, between float32 arrays.
    """
    if np.dtype(dtype).itemsize == 4:
        return "exact"
    return "narrow" if kappa.name == "softmax" else "pair"


@dataclasses.dataclass(frozen=True)
class Form:
    """Everything about a call that its kernels are compiled for, but for tiles.

    heads, u_heads, kv_heads: of the query (q or w), of u (the write's: its query's) and of keys and values; key_width,
    value_width: K and V; similarity: "linear", "relu", "exp", "softmax" or "round"; power: 10 to the number of decimals
    of "round"; operands: as `operands` says; tied: one softmax writes and reads; has_…: that optional array is there.
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

    @property
    def queries(self) -> Layout:
        """q, w, and their gradients: [B, T, heads, K]."""
        return Layout(self.heads, self.key_width)

    @property
    def keys(self) -> Layout:
        """k [B, T, kv_heads, K]."""
        return Layout(self.kv_heads, self.key_width)

    @property
    def values(self) -> Layout:
        """v [B, T, kv_heads, V]."""
        return Layout(self.kv_heads, self.value_width)

    @property
    def u(self) -> Layout:
        """u, and what has its shape: [B, T, u_heads, V]."""
        return Layout(self.u_heads, self.value_width)

    @property
    def out(self) -> Layout:
        """out, and its gradient: [B, T, heads, V]."""
        return Layout(self.heads, self.value_width)

    @property
    def key_gradients(self) -> Layout:
        """dk, before heads that share a key are summed: [B, T, u_heads, K]."""
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
        """Whether the write gives s. dβ needs it: from u = α v − β s it could not be had where β is 0."""
        return self.tied or self.has_beta

    @property
    def score_precision(self) -> str:
        """Of products of float32 queries with keys; of two-byte ones it says nothing."""
        return "tf32x3"

    @property
    def precision(self) -> str:
        """Of products between float32 registers: as exact as what else is computed from the arrays."""
        return {"narrow": "tf32", "pair": "bf16x3", "exact": "tf32x3"}[self.operands]
