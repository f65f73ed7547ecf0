"""A mixture of experts: each token's feed-forward layer is a weighted sum of k of E small ones.

    y = Σ_{e of the k} p_e FFN_e(x) + FFN_shared(x),        FFN_e(x) = (silu(x W_gate,e) ⊙ x W_up,e) W_down,e

No token is dropped: the tokens are laid out by expert, and each expert multiplies as many as it has. Read as a memory,
the layer holds E times as many pairs of keys and values, of which a token reads k/E (`reproduce snr_sweeps`).
Sources: Shazeer et al., arXiv 1701.06538; without dropped tokens, Gale et al., MegaBlocks, arXiv 2211.15841; shared
experts, Dai et al., DeepSeekMoE, arXiv 2401.06066.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deltaformer_jax.config.checks import check_argument
from deltaformer_jax.layers.feed_forward.gated import SwiGLU
from deltaformer_jax.layers.feed_forward.routing import Router, Routing
from deltaformer_jax.layers.feed_forward.sizes import check_width
from deltaformer_jax.layers.linear import kernel, product_flops
from deltaformer_jax.ops.common.rematerialisation import kept
from deltaformer_jax.ops.grouped_product import from_blocks, grouped_product, layout, to_blocks

EXPERT_AXIS = "expert"


class Experts(nnx.Module):
    """The kernels of E swiglu layers: gate and up [E, d_model, expert_dim], down [E, expert_dim, d_model]."""

    def __init__(self, d_model: int, expert_dim: int, num_experts: int, *, output_scale: float = 1.0, rngs: nnx.Rngs):
        check_width(expert_dim)
        check_argument("num_experts", num_experts)
        into, out = (num_experts, d_model, expert_dim), (num_experts, expert_dim, d_model)
        self.gate = kernel(rngs, into, ("expert", "embed", "mlp"), fan_in=d_model)
        self.up = kernel(rngs, into, ("expert", "embed", "mlp"), fan_in=d_model)
        self.down = kernel(rngs, out, ("expert", "mlp", "embed"), fan_in=expert_dim, scale=output_scale)

    def __call__(self, rows, experts, weights, dtype):
        """rows [n,d], experts and weights [n,k] -> Σ over the k p_e FFN_e(row), of the experts 0 … E − 1 alone."""
        at = layout(experts, self.gate.shape[0])
        blocks = kept(to_blocks(rows, at))
        gate, up = (grouped_product(blocks, w[...].astype(dtype), at.group) for w in (self.gate, self.up))
        out = grouped_product(kept(jax.nn.silu(gate) * up), self.down[...].astype(dtype), at.group)
        return jnp.sum(from_blocks(out, at) * weights[..., None].astype(dtype), axis=1)


class ExpertsFeedForward(nnx.Module):
    """y = Σ p_e FFN_e(x): x [B,T,d_model] -> [B,T,d_model] in `dtype`; `routed` also returns the Routing.

    num_experts E, experts_per_token k ≤ E, each of hidden width `expert_dim`; `shared_experts` s: one more SwiGLU of
    width s · expert_dim for every token. `expert_pool`: the layer has no experts of its own; each call is given the
    `Experts` that all layers share, as in UniPool (arXiv 2605.06665). `router`: "softmax" or "norm" (routing.py),
    `renormalise_experts`: whether the k weights of a token are divided by their sum. `output_scale` multiplies the last
    kernels' initial values.

    On a mesh whose axis "expert" has m devices, each holds E/m experts and computes them for the tokens of all m: these
    are gathered, and the results summed and scattered. A device then has room for m times its own tokens, since any
    number of them may choose its experts.

    Cost: 2 d_model E + 6 d_model expert_dim (k + s) FLOPs per token. Memory: k copies of the tokens.
    """

    def __init__(
        self,
        d_model: int,
        expert_dim: int,
        *,
        num_experts: int,
        experts_per_token: int,
        shared_experts: int = 0,
        router: str = "softmax",
        renormalise_experts: bool = True,
        expert_pool: bool = False,
        output_scale: float = 1.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_width(expert_dim)
        check_argument("experts_per_token", experts_per_token)
        if experts_per_token > num_experts:
            raise ValueError(
                f"experts_per_token={experts_per_token} must be at most num_experts={num_experts}: a token goes to "
                "different experts"
            )
        self.router = Router(
            d_model, num_experts, experts_per_token, kind=router, renormalise=renormalise_experts, rngs=rngs
        )
        make = functools.partial(Experts, d_model, expert_dim, num_experts, output_scale=output_scale)
        self.experts = None if expert_pool else make(rngs=rngs)
        width = shared_experts * expert_dim
        self.shared = SwiGLU(d_model, width, output_scale=output_scale, dtype=dtype, rngs=rngs) if width else None
        self.dtype = jnp.dtype(dtype)
        self.d_model, self.expert_dim = d_model, expert_dim
        self.num_experts, self.experts_per_token = num_experts, experts_per_token

    def __call__(self, x, segment_ids=None, pool: Experts | None = None):
        return self.routed(x, segment_ids, pool)[0]

    def routed(self, x, segment_ids=None, pool: Experts | None = None) -> tuple[jax.Array, Routing]:
        """(y, Routing). `segment_ids` int [B,T]: 0 is padding, which goes to no expert, is counted nowhere and gives 0;
        it may hold anything. `pool`: the experts of a layer that has none of its own."""
        x = x.astype(self.dtype)
        real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids != 0
        if segment_ids is not None:
            x = jnp.where(real[..., None], x, 0)
        rows = kept(x).reshape(-1, self.d_model)
        experts, weights, routing = self.router(rows, real.reshape(-1))
        y = self._over_devices(pool if self.experts is None else self.experts, rows, experts, weights).reshape(x.shape)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, routing

    def _over_devices(self, held: Experts, rows, experts, weights):
        own = held.gate.shape[0]
        if own == self.num_experts:
            return held(rows, experts, weights, self.dtype)
        gather = lambda array: lax.all_gather(array, EXPERT_AXIS, tiled=True)
        rows, experts, weights = map(gather, (rows, experts, weights))
        first = own * lax.axis_index(EXPERT_AXIS)
        here = (experts >= first) & (experts < first + own)
        y = held(rows, jnp.where(here, experts - first, own), jnp.where(here, weights, 0), self.dtype)
        return lax.psum_scatter(y, EXPERT_AXIS, tiled=True)

    def flops_per_token(self, length: int) -> float:
        """2 d_model E + 6 d_model expert_dim (k + s): what a token goes through. `length` has no influence."""
        experts = 6.0 * self.d_model * self.expert_dim * self.experts_per_token
        shared = 0.0 if self.shared is None else self.shared.flops_per_token(length)
        return product_flops(self.router.kernel) + experts + shared
