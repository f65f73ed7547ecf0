"""The queries, keys and values of an attention mixer.

    q = rotate(norm(conv(x W_q))),     k = rotate(norm(shift(conv(x W_k)))),     v = shift(conv(x W_v))

The rotation (RoPE), the norm (a per-head RMSNorm, "qk-norm"), the shift (KV shifting) and the short convolution (with
its SiLU) are each optional.
Source: RoPE arXiv 2104.09864; qk-norm as in Dehghani et al., arXiv 2302.05442, with RMSNorm instead of LayerNorm; KV
shifting arXiv 2411.19574; the convolutions as in DeltaNet, arXiv 2406.06484.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.config.checks import check_argument
from deltaformer_jax.config.rope_scaling import magnitude, parse
from deltaformer_jax.layers.kv_shift import KVShift, ShiftTail
from deltaformer_jax.layers.linear import bias, kernel, plus, product_flops, products
from deltaformer_jax.layers.norms import AllHeadsNorm, RMSNorm
from deltaformer_jax.layers.rotary import check_rotary, rotary_width, rotate
from deltaformer_jax.layers.short_convolution import ShortConvolution


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class InputTail:
    """What the next call needs of earlier tokens: the tails of the KV shift and of the convolutions of q, k and v."""

    shift: ShiftTail | None
    convolutions: tuple[jax.Array, ...]


class QueryKeyValue(nnx.Module):
    """x [B,T,d_model] -> q [B,T,H,K], k [B,T,G,K], v [B,T,G,K], all in `dtype`, the tail for the next call, and a list.

    The list holds the products of x with the kernels `beside`. Computed with the others, so that on a mesh the gradient
    of x through all of them is summed over devices once.

    `rope_base=None` leaves out the rotation, `conv_size=0` the convolutions. A call with `turned=False` leaves the
    rotation to its caller, who has `rotated` for it. `rotary_fraction`: how much of a head is rotated; `rope_scaling`:
    for longer contexts, such as "linear:4". `qkv_bias`: biases on the three maps. The gains of qk-norm are [K] and
    shared by all heads; `qk_norm_over="all_heads"` normalises all heads of a token together, with gains [H, K] and
    [G, K]. Cost: `flops_per_token`.
    Raises ValueError, naming the argument, for sizes that don't fit each other.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope_base: float | None,
        qk_norm: bool,
        kv_shift: bool,
        kv_shift_window: int = 2,
        kv_shift_parts: str = "both",
        conv_size: int,
        norm_epsilon: float,
        norm_gain: str = "scale",
        qk_norm_over: str = "head",
        qkv_bias: bool = False,
        rotary_fraction: float = 1.0,
        rope_scaling: str = "none",
        dtype,
        rngs: nnx.Rngs,
    ):
        check_heads(d_model, num_heads, num_kv_heads, head_dim, rope_base, rotary_fraction, rope_scaling)
        check_argument("norm_gain", norm_gain)
        check_argument("qk_norm_over", qk_norm_over)
        for name, value, default in (
            ("kv_shift_window", kv_shift_window, 2),
            ("kv_shift_parts", kv_shift_parts, "both"),
        ):
            if value != default and not kv_shift:
                raise ValueError(f"{name}={value!r} needs kv_shift=True")
        self.query = kernel(rngs, (d_model, num_heads, head_dim), ("embed", "heads", "head_dim"))
        self.key = kernel(rngs, (d_model, num_kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.value = kernel(rngs, (d_model, num_kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        heads = ((num_heads, "heads"), (num_kv_heads, "kv_heads"), (num_kv_heads, "kv_heads"))
        self.query_bias, self.key_bias, self.value_bias = (
            bias((number, head_dim), (axis, "head_dim")) if qkv_bias else None for number, axis in heads
        )
        if not qk_norm:
            self.query_norm = self.key_norm = None
        elif qk_norm_over == "head":
            one = dict(epsilon=norm_epsilon, axis="head_dim", gain=norm_gain)
            self.query_norm, self.key_norm = RMSNorm(head_dim, **one), RMSNorm(head_dim, **one)
        else:
            whole = dict(epsilon=norm_epsilon, gain=norm_gain)
            self.query_norm = AllHeadsNorm(num_heads, head_dim, "heads", **whole)
            self.key_norm = AllHeadsNorm(num_kv_heads, head_dim, "kv_heads", **whole)
        shift = dict(window=kv_shift_window, parts=kv_shift_parts, rngs=rngs)
        self.shift = KVShift(num_kv_heads, **shift) if kv_shift else None
        if conv_size:
            self.convolutions = nnx.List(
                [ShortConvolution(conv_size, number, head_dim, axis=axis, rngs=rngs) for number, axis in heads]
            )
        else:
            self.convolutions = None
        self.rope_base, self.rotary_fraction, self.rope_scaling = rope_base, rotary_fraction, rope_scaling
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, x, *, positions, segment_ids=None, tail: InputTail | None = None, beside: Sequence = (), turned=True
    ):
        biases = self.query_bias, self.key_bias, self.value_bias
        mapped = products(x, [self.query, self.key, self.value, *beside], self.dtype)
        maps = [plus(y, b) for y, b in zip(mapped[:3], biases)]
        shift, convolutions = (None, (None,) * 3) if tail is None else (tail.shift, tail.convolutions)
        if self.convolutions is not None:
            done = [
                convolution(y, segment_ids=segment_ids, tail=before)
                for convolution, y, before in zip(self.convolutions, maps, convolutions)
            ]
            maps, convolutions = [y for y, _ in done], tuple(after for _, after in done)
        query, key, value = maps
        if self.shift is not None:
            key, value, shift = self.shift(key, value, segment_ids=segment_ids, tail=shift)
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if turned and self.rope_base is not None:
            query, key = (self.rotated(y, positions, self.rope_base) for y in (query, key))
        return query, key, value, None if tail is None else InputTail(shift, convolutions), mapped[3:]

    def rotated(self, y, positions, base: float):
        """y [B,T,heads,K] turned by the rotary embedding of that base."""
        return rotate(y, positions, base, self.rotary_fraction, self.rope_scaling)

    def moved(self, y, by, base: float | None):
        """y [B,N,heads,K], which the rotary embedding of that base turned, turned by `by` [B,N] positions more.

        rotate(y, p) becomes rotate(y, p + by), up to rounding. A scaling's factor is in y already.
        """
        if base is None:
            return y
        width, scaling = rotary_width(y.shape[-1], self.rotary_fraction), parse(self.rope_scaling)
        turned = rotate(y[..., :width], by, base, scaling=self.rope_scaling) / magnitude(scaling)
        return jnp.concatenate([turned.astype(y.dtype), y[..., width:]], axis=-1)

    def empty_tail(self, batch: int) -> InputTail:
        """The tail before the first token: zeros for each of the options that are in use."""
        shift = None if self.shift is None else self.shift.empty_tail(batch, self.key.shape[-1], self.dtype)
        convolutions = () if self.convolutions is None else self.convolutions
        return InputTail(shift, tuple(part.empty_tail(batch, self.dtype) for part in convolutions))

    def flops_per_token(self) -> float:
        """2 d_model K (H + 2 G), and 2 for each weight of a convolution."""
        convolutions = () if self.convolutions is None else [part.weight for part in self.convolutions]
        return product_flops(self.query, self.key, self.value, *convolutions)


def check_heads(
    d_model: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rope_base: float | None,
    rotary_fraction: float = 1.0,
    rope_scaling: str = "none",
):
    """Raises ValueError, naming the argument first, unless the sizes fit each other."""
    sizes = {"d_model": d_model, "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} must be at least 1")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    check_rotary(head_dim, rope_base, rotary_fraction, rope_scaling)
