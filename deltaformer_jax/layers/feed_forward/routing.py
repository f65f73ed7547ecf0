"""Routing of tokens to experts: which ones, with which weights, and what a loss needs to know of it.

    softmax   p = softmax(x W_r);   the k largest p_e, divided by their sum with `renormalise`
    norm      p = s c relu(z / ‖z‖),  z = x W_r;   the k largest p_e

c makes the k largest of p have length 1 in the mean square, for standard normal z of E numbers; s is trained and starts
at 1.
Sources: softmax, Shazeer et al., arXiv 1701.06538; k of E without noise, as in Jiang et al., Mixtral, arXiv 2401.04088;
norm, UniPool, arXiv 2605.06665. Losses: balance, Fedus et al., Switch Transformers, arXiv 2101.03961, eq. 4, for k ≥ 1;
z, Zoph et al., ST-MoE, arXiv 2202.08906, eq. 5.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.config.checks import check_argument
from deltaformer_jax.layers.linear import along, wide_kernel
from deltaformer_jax.layers.norms import l2_normalize
from deltaformer_jax.sharding.activations import summed_over_tokens

_DRAWS = 200_000  # vectors z, of which c is a mean: within 0.2 %


class Routing(NamedTuple):
    """Sums over the real tokens of a layer's input, float32.

    counts [E]: tokens sent to each expert. probabilities [E]: p, divided by its sum; nothing of a token whose p are all
    0. squares []: logsumexp(x W_r)². tokens []: 1.
    """

    counts: jax.Array
    probabilities: jax.Array
    squares: jax.Array
    tokens: jax.Array


def router_losses(routing: Routing) -> tuple[jax.Array, jax.Array]:
    """(balance, z) of a batch's Routing [L, ...], the means over L layers; the devices' shares of them, see below.

        balance = E Σ_e f_e P_e,  f_e = counts_e / Σ counts,  P_e = probabilities_e / Σ probabilities
        z = squares / n

    n is the number of real tokens; f and the sum of probabilities have no gradient. On devices that have parts of a
    batch, f, n and that sum are those of the whole batch, and the sum of the devices' results is the loss of the whole.
    """
    counts, chosen, tokens = (
        summed_over_tokens(jax.lax.stop_gradient(x))
        for x in (routing.counts, jnp.sum(routing.probabilities, axis=-1), routing.tokens)
    )
    shares = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1)
    balance = counts.shape[-1] * jnp.sum(shares * routing.probabilities, axis=-1) / jnp.maximum(chosen, 1)
    return jnp.mean(balance), jnp.mean(routing.squares / jnp.maximum(tokens, 1))


class Router(nnx.Module):
    """x [n,d_model], real bool [n] -> (experts int32 [n,k], weights float32 [n,k], Routing).

    The expert of a token that is not real is E, which there is none of; its weight is 0. All is computed in float32.
    """

    def __init__(
        self, d_model: int, num_experts: int, experts_per_token: int, *, kind: str, renormalise: bool, rngs: nnx.Rngs
    ):
        check_argument("router", kind)
        self.kernel = wide_kernel(rngs, (d_model, num_experts), ("embed", "routes"))
        self.scale = nnx.Param(jnp.ones((), jnp.float32), axes=(), decay=False) if kind == "norm" else None
        self.num_experts, self.experts_per_token, self.renormalise = num_experts, experts_per_token, renormalise

    def __call__(self, x, real):
        numbers = jnp.matmul(x.astype(jnp.float32), self.kernel[...], precision="highest")
        if self.scale is None:
            scores = shares = jax.nn.softmax(numbers, axis=-1)
        else:
            positive = jax.nn.relu(l2_normalize(numbers))
            scores = along(self.scale, numbers) * norm_factor(self.num_experts, self.experts_per_token) * positive
            # The balance is that of the scores; where all are 0, no expert is used.
            shares = positive / jnp.maximum(jnp.sum(positive, axis=-1, keepdims=True), 1e-12)
        weights, experts = jax.lax.top_k(scores, self.experts_per_token)
        if self.renormalise and self.scale is None:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        weights = jnp.where(real[:, None], weights, 0)
        experts = jnp.where(real[:, None], experts, self.num_experts)
        squares = jnp.where(real, jax.nn.logsumexp(numbers, axis=-1) ** 2, 0)
        routing = Routing(
            counts=jnp.sum(experts.reshape(-1, 1) == jnp.arange(self.num_experts), axis=0, dtype=jnp.float32),
            probabilities=jnp.sum(jnp.where(real[:, None], shares, 0), axis=0),
            squares=jnp.sum(squares),
            tokens=jnp.sum(real, dtype=jnp.float32),
        )
        return experts, weights, routing


@functools.lru_cache(maxsize=64)
def norm_factor(num_experts: int, experts_per_token: int) -> float:
    """c = 1 / √E‖the k largest of relu(z/‖z‖)‖², z standard normal of E numbers, by Monte Carlo from a fixed seed.

    UniPool takes E[1/‖…‖], which is infinite: the k largest are as small as one likes with a positive density. Where
    that is too rare to be drawn (16 experts and more), its value is up to a tenth larger.
    """
    rng, squares = np.random.default_rng(0), []
    for _ in range(-(-_DRAWS * num_experts // 2**22)):
        z = rng.standard_normal((min(_DRAWS, 2**22 // num_experts), num_experts))
        positive = np.maximum(z, 0) / np.linalg.norm(z, axis=-1, keepdims=True)
        top = np.partition(positive, -experts_per_token, axis=-1)[:, -experts_per_token:]
        squares.append(np.sum(top**2, axis=-1))
    return float(np.mean(np.concatenate(squares)) ** -0.5)
