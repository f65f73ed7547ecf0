"""The input and output projections that the recurrent mixers share.

q, k, v = conv(x W_q), conv(x W_k), conv(x W_v)          conv: short convolution with SiLU, optional
y = (HeadNorm(o) ⊙ activation(x W_g)) W_o                 the gate activation(x W_g) is optional
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.config.checks import check_argument
from deltaformer_jax.layers.linear import (
    bias,
    kernel,
    plus,
    product,
    product_flops,
    product_into_stream,
    product_of_low_rank,
    products,
)
from deltaformer_jax.layers.norms import HeadNorm
from deltaformer_jax.layers.short_convolution import ShortConvolution


class MemoryInputs(nnx.Module):
    """x [B,T,d_model] -> q, k [B,T,H,K], v [B,T,Hv,V] in `dtype`, the convolutions' tails, and a list.

    The tails are for the next call. The list holds the products of x with the kernels `beside`, as of `QueryKeyValue`.
    `conv_size=0`: no convolutions, and tails are (). `conv_bias`: the convolutions have biases. `silu`: SiLU also where
    there is no convolution. `writes`: keys and values per token and head; k is then [B,T,H·writes,K] and v
    [B,T,Hv·writes,V], those of one head side by side. Raises ValueError, naming the argument, for sizes that don't fit.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_value_heads: int,
        head_dim: int,
        value_dim: int,
        *,
        conv_size: int,
        conv_bias: bool = False,
        silu: bool = False,
        writes: int = 1,
        dtype,
        rngs: nnx.Rngs,
    ):
        sizes = dict(num_heads=num_heads, num_value_heads=num_value_heads, head_dim=head_dim, value_dim=value_dim)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if num_value_heads % num_heads:
            raise ValueError(f"num_value_heads={num_value_heads} must be a multiple of num_heads={num_heads}")
        self.query = kernel(rngs, (d_model, num_heads, head_dim), ("embed", "heads", "head_dim"))
        self.key = kernel(rngs, (d_model, num_heads * writes, head_dim), ("embed", "heads", "head_dim"))
        self.value = kernel(rngs, (d_model, num_value_heads * writes, value_dim), ("embed", "heads", "head_dim"))
        if conv_size:
            shapes = [
                (num_heads, head_dim),
                (num_heads * writes, head_dim),
                (num_value_heads * writes, value_dim),
            ]
            self.convolutions = nnx.List(
                [ShortConvolution(conv_size, *shape, has_bias=conv_bias, rngs=rngs) for shape in shapes]
            )
        else:
            self.convolutions = None
        self.silu = silu and not conv_size  # a convolution has its own
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x, *, segment_ids=None, tails=None, beside: Sequence = ()):
        mapped = products(x, [self.query, self.key, self.value, *beside], self.dtype)
        maps, others = mapped[:3], mapped[3:]
        if self.convolutions is None:
            return *(map(jax.nn.silu, maps) if self.silu else maps), (), others
        before = (None, None, None) if tails is None else tails
        done = [
            convolution(y, segment_ids=segment_ids, tail=tail)
            for convolution, y, tail in zip(self.convolutions, maps, before)
        ]
        return *(y for y, _ in done), tuple(tail for _, tail in done), others

    def empty_tails(self, batch: int):
        """The convolutions' tails before the first token."""
        if self.convolutions is None:
            return ()
        return tuple(convolution.empty_tail(batch, self.dtype) for convolution in self.convolutions)

    def flops_per_token(self) -> float:
        """The three products with kernels, and 2 for each weight of a convolution."""
        convolutions = () if self.convolutions is None else [part.weight for part in self.convolutions]
        return product_flops(self.query, self.key, self.value, *convolutions)


class MemoryOutput(nnx.Module):
    """y = (HeadNorm(o) ⊙ activation(x W_g)) W_o: (o [B,T,Hv,V], x [B,T,d_model], [x W_g]) -> [B,T,d_model] in `dtype`.

    The list holds the products of x with the kernels of `beside`, which the mixer computes with its other products of x
    (`MemoryInputs`): x W_g, unless W_g has a low rank.
    `gate`: the activation, "swish" or "sigmoid"; "": no gate. `gate_rank` above 0: W_g is a product of two kernels,
    d_model × gate_rank and gate_rank × (Hv V). `gate_bias`: a bias [Hv, V] is added to x W_g.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        value_dim: int,
        *,
        gate: str,
        gate_rank: int = 0,
        gate_bias: bool = False,
        epsilon: float,
        output_scale: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        if gate:
            check_argument("output_gate_activation", gate)
        self.norm = HeadNorm(value_dim, activation=gate or "swish", epsilon=epsilon)
        low_rank = bool(gate and gate_rank)
        self.gate_down = kernel(rngs, (d_model, gate_rank), ("embed", "rank")) if low_rank else None
        rows, axis = (gate_rank, "rank") if low_rank else (d_model, "embed")
        self.gate = kernel(rngs, (rows, heads, value_dim), (axis, "heads", "head_dim")) if gate else None
        self.gate_bias = bias((heads, value_dim), ("heads", "head_dim")) if gate and gate_bias else None
        self.output = kernel(
            rngs,
            (heads, value_dim, d_model),
            ("heads", "head_dim", "embed"),
            fan_in=heads * value_dim,
            scale=output_scale,
        )
        self.dtype = jnp.dtype(dtype)

    @property
    def beside(self) -> list:
        """The kernels whose products with x are computed with the mixer's others."""
        return [self.gate] if self.gate is not None and self.gate_down is None else []

    def __call__(self, o, x, mapped: Sequence):
        gate = None
        if self.gate_down is not None:
            low = product_of_low_rank(x, self.gate_down, self.dtype)
            gate = plus(product(low, self.gate, self.dtype), self.gate_bias)
        elif self.gate is not None:
            gate = plus(mapped[0], self.gate_bias)
        read = self.norm(o.astype(self.dtype), gate)
        return product_into_stream(read, self.output, self.dtype, axes=2)

    def flops_per_token(self) -> float:
        """The products with the kernels of the gate and of the output."""
        return product_flops(self.gate, self.gate_down, self.output)
