"""The queries, keys and values of an attention mixer.

    q = rotate(norm(x W_q)),     k = rotate(norm(shift(x W_k))),     v = shift(x W_v)

where the rotation (RoPE), the norm (a per-head RMSNorm, "qk-norm") and the shift (KV shifting) are each there or not.
Source: RoPE arXiv 2104.09864; qk-norm as in Dehghani et al., arXiv 2302.05442, with RMSNorm for LayerNorm; KV shifting
arXiv 2411.19574.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.kv_shift import KVShift, ShiftTail
from deltaformer_jax.layers.linear import kernel
from deltaformer_jax.layers.norms import RMSNorm
from deltaformer_jax.layers.rotary import rotate


class QueryKeyValue(nnx.Module):
    """x [B,T,d_model] -> q [B,T,H,K], k [B,T,G,K], v [B,T,G,K], all in `dtype`, and the shift's tail.

    `rope_base=None` leaves out the rotation. The gains of qk-norm are [K], shared by the heads.
    Cost: 2 d_model K (H + 2 G) FLOPs per token.
    Raises ValueError for sizes that don't fit each other.
    """

    def __init__(
        self, d_model: int, num_heads: int, num_kv_heads: int, head_dim: int, *,
        rope_base: float | None, qk_norm: bool, kv_shift: bool, norm_epsilon: float, dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        check_heads(d_model, num_heads, num_kv_heads, head_dim, rope_base)
        self.query = kernel(rngs, (d_model, num_heads, head_dim), ("embed", "heads", "head_dim"))
        self.key = kernel(rngs, (d_model, num_kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.value = kernel(rngs, (d_model, num_kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.query_norm = RMSNorm(head_dim, epsilon=norm_epsilon, axis="head_dim") if qk_norm else None
        self.key_norm = RMSNorm(head_dim, epsilon=norm_epsilon, axis="head_dim") if qk_norm else None
        self.shift = KVShift(num_kv_heads, rngs=rngs) if kv_shift else None
        self.rope_base = rope_base
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x, *, positions, segment_ids=None, tail: ShiftTail | None = None):
        query = project(x, self.query, self.dtype)
        key = project(x, self.key, self.dtype)
        value = project(x, self.value, self.dtype)
        if self.shift is not None:
            key, value, tail = self.shift(key, value, segment_ids=segment_ids, tail=tail)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rope_base is not None:
            query, key = rotate(query, positions, self.rope_base), rotate(key, positions, self.rope_base)
        return query, key, value, tail

    def empty_tail(self, batch: int) -> ShiftTail | None:
        """The tail before the first token: zeros, or None without a shift."""
        if self.shift is None:
            return None
        zeros = jnp.zeros((batch, *self.key.shape[-2:]), self.dtype)
        return ShiftTail(zeros, zeros)


def project(x, weight: nnx.Param, dtype):
    """x [B,T,D] by a kernel [D,H,K] -> [B,T,H,K], operands and result in `dtype`."""
    return jnp.einsum("btd,dhk->bthk", x.astype(dtype), weight[...].astype(dtype))


def check_heads(d_model: int, num_heads: int, num_kv_heads: int, head_dim: int, rope_base: float | None):
    """Raises ValueError, naming the argument first, unless the sizes fit each other."""
    sizes = {"d_model": d_model, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    if rope_base is not None and head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be even for the rotary embedding, or switch that off (rope_base)")
    if rope_base is not None and rope_base <= 1:
        raise ValueError(f"rope_base={rope_base} must be greater than 1")
