"""The trained numbers of a position bias of attention scores. `ops/position_bias.py` has the formulas.

* Kerple: p_h = 0.01 + e^θ, with e^θ drawn from [0.01, 2); a_h = 0.01 + e^η, with e^η drawn from [0.01, 1). So both stay
  positive without being clipped.
* FIRE: c = e^γ starts at 0.1; L = L₀ e^λ starts at L₀ = `fire_length`, which in the paper is a quarter of the training
  length; f has 32 hidden features, drawn with a bias each, so that their kinks lie at different distances.
* DAPE: the last layer of f starts at 0, so that the bias starts as its static part.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.config.checks import check_argument
from deltaformer_jax.layers.linear import truncated_normal

FIRE_WIDTH = 32
LEAST = 0.01  # of Kerple's p and a


class Kerple(nnx.Module):
    """−p_h log(1 + a_h (i − j)) for H = num_heads; `axis` is their name in the mesh rules."""

    def __init__(self, num_heads: int, *, axis: str = "heads", rngs: nnx.Rngs):
        log_uniform = lambda most: jnp.log(jax.random.uniform(rngs.params(), (num_heads,), minval=LEAST, maxval=most))
        self.log_p = nnx.Param(log_uniform(2.0), axes=(axis,), decay=False)
        self.log_a = nnx.Param(log_uniform(1.0), axes=(axis,), decay=False)

    def __call__(self) -> ops.PositionBias:
        return ops.Kerple(*(LEAST + jnp.exp(x[...]) for x in (self.log_p, self.log_a)))

    def flops_per_pair(self) -> float:
        return 0.0


class Fire(nnx.Module):
    """f_h(ψ(i − j) / ψ(max(L, i))) for H = num_heads; L starts at `fire_length` tokens."""

    def __init__(self, num_heads: int, fire_length: int, *, axis: str = "heads", rngs: nnx.Rngs):
        self.fire_length = fire_length
        self.log_c = nnx.Param(jnp.full((1,), math.log(0.1), jnp.float32), axes=("shared",), decay=False)
        self.log_length = nnx.Param(jnp.zeros((1,), jnp.float32), axes=("shared",), decay=False)
        self.weight_in = nnx.Param(truncated_normal(rngs, (1, FIRE_WIDTH), 1.0), axes=("shared", "rank"))
        self.bias_in = nnx.Param(truncated_normal(rngs, (1, FIRE_WIDTH), 1.0), axes=("shared", "rank"), decay=False)
        out = truncated_normal(rngs, (num_heads, FIRE_WIDTH), FIRE_WIDTH**-0.5)
        self.weight_out = nnx.Param(out, axes=(axis, "rank"))

    def __call__(self) -> ops.PositionBias:
        network = (x[...] for x in (self.weight_in, self.bias_in, self.weight_out))
        return ops.Fire(jnp.exp(self.log_c[...]), self.fire_length * jnp.exp(self.log_length[...]), *network)

    def flops_per_pair(self) -> float:
        return 2.0 * math.prod(self.weight_out.shape[-2:])


class Alibi(nnx.Module):
    """−m_h (i − j), with the fixed slopes m_h of H heads."""

    def __init__(self, slopes: tuple[float, ...]):
        self.slopes = slopes

    def __call__(self) -> ops.PositionBias:
        return ops.Alibi(jnp.asarray(self.slopes, jnp.float32))

    def flops_per_pair(self) -> float:
        return 0.0


class Dape(nnx.Module):
    """B + f(A, B) for the H = num_heads of `static`, B; f has `dape_dim` hidden features."""

    def __init__(
        self, static: Kerple | Fire | Alibi, num_heads: int, dape_dim: int, *, axis: str = "heads", rngs: nnx.Rngs
    ):
        self.static = static
        into = lambda: truncated_normal(rngs, (num_heads, dape_dim), (2 * num_heads) ** -0.5)
        self.scores_in = nnx.Param(into(), axes=(axis, "rank"))
        self.static_in = nnx.Param(into(), axes=(axis, "rank"))
        self.bias_in = nnx.Param(jnp.zeros((1, dape_dim), jnp.float32), axes=("shared", "rank"), decay=False)
        self.weight_out = nnx.Param(jnp.zeros((num_heads, dape_dim), jnp.float32), axes=(axis, "rank"))

    def __call__(self) -> ops.PositionBias:
        network = (self.scores_in, self.static_in, self.bias_in, self.weight_out)
        return ops.Dape(self.static(), *(x[...] for x in network))

    def flops_per_pair(self) -> float:
        return self.static.flops_per_pair() + 6.0 * math.prod(self.scores_in.shape[-2:])


def position_bias_of(
    kind: str,
    slopes: list[float] | None,
    num_heads: int,
    fire_length: int,
    dape_dim: int,
    *,
    axis: str = "heads",
    rngs: nnx.Rngs,
) -> Kerple | Fire | Dape | None:
    """The bias of a mixer's arguments position_bias = `kind`, fire_length and dape_dim, or None. `slopes`: of its
    ALiBi, None if it has none. ALiBi alone needs no bias: it is a constant log decay. `axis`: the name of its heads in
    the mesh rules.

    Raises ValueError naming the argument.
    """
    for name, value in dict(position_bias=kind, fire_length=fire_length, dape_dim=dape_dim).items():
        check_argument(name, value)
    if kind != "none" and slopes is not None:
        raise ValueError(f"position_bias={kind!r} and alibi=True are two biases of the same scores: give one of them")
    if kind == "none" and slopes is None and dape_dim:
        raise ValueError(f'dape_dim={dape_dim} needs a static bias: give position_bias="kerple" or "fire", or alibi')
    if kind == "none" and not dape_dim:
        return None
    if kind == "kerple":
        static = Kerple(num_heads, axis=axis, rngs=rngs)
    elif kind == "fire":
        static = Fire(num_heads, fire_length, axis=axis, rngs=rngs)
    else:
        static = Alibi(tuple(slopes))
    return Dape(static, num_heads, dape_dim, axis=axis, rngs=rngs) if dape_dim else static
