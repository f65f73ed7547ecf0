"""What a kernel knows while it is compiled, in a few named bundles: one argument each instead of thirty."""

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


# Of products between float32 registers: as exact as what else is computed from the arrays.
_PRECISION = {"narrow": "tf32", "pair": "bf16x3", "exact": "tf32x3"}


@dataclasses.dataclass(frozen=True)
class Weighting:
    """How weights are computed and multiplied.

    similarity: "linear", "relu", "exp", "softmax" or "round"; power: 10 to the number of decimals of "round";
    operands: as `operands` says; tied: one softmax writes and reads.
    """

    similarity: str
    power: float
    operands: str
    tied: bool = False

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
    def score_precision(self) -> str:
        """Of products between the arrays of queries and keys."""
        return "tf32x3"

    @property
    def precision(self) -> str:
        """Of products between float32 registers."""
        return _PRECISION[self.operands]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Numbers of heads, and widths: K of `key`, V of `value`. u of the write has as many heads as its query."""

    heads: int
    u_heads: int
    kv_heads: int
    key: int
    value: int

    @property
    def queries(self) -> Layout:
        """q, w, and their gradients: [B, T, heads, K]."""
        return Layout(self.heads, self.key)

    @property
    def keys(self) -> Layout:
        """k [B, T, kv_heads, K]."""
        return Layout(self.kv_heads, self.key)

    @property
    def values(self) -> Layout:
        """v [B, T, kv_heads, V]."""
        return Layout(self.kv_heads, self.value)

    @property
    def u(self) -> Layout:
        """u, and what has its shape: [B, T, u_heads, V]."""
        return Layout(self.u_heads, self.value)

    @property
    def out(self) -> Layout:
        """out, and its gradient: [B, T, heads, V]."""
        return Layout(self.heads, self.value)

    @property
    def key_gradients(self) -> Layout:
        """dk, before heads that share a key are summed: [B, T, u_heads, K]."""
        return Layout(self.u_heads, self.key)


@dataclasses.dataclass(frozen=True)
class Present:
    """Which of the optional arrays a call has."""

    alpha: bool
    beta: bool
    segments: bool
