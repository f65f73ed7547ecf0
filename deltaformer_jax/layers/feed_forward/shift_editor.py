"""Shift-FFN: the input of a feed-forward layer, edited by the token before it.

    h̃_t = h_t + W_cᵀ ((W_bᵀ h_{t−1}) ⊙ relu(W_aᵀ [h_{t−1}; h_t])),      then FFN(h̃_t)

h is what the feed-forward layer would get: its normalised input. Both tokens together gate what passes of the earlier
one. At the first token of a document h_{t−1} = 0, so that nothing is added. W_c starts at 0: the model starts as one
without the editor.

Source: "Shift-FFN", arXiv 2505.17153, which adds it to models that are already trained. W_c = 0 at the start, the zero
before a document and the place behind the norm are this project's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.layers.kv_shift import last_real_token
from deltaformer_jax.layers.linear import kernel, product_flops, product_of_low_rank
from deltaformer_jax.layers.padding import clear_padding
from deltaformer_jax.sharding import over_previous_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShiftedCache:
    """The cache of a block whose feed-forward layer has an editor, with one document per row.

    `mixer`: the mixer's cache. `previous` [B,2r]: what the editor needs of the last real token, W_bᵀ h and the first
    half of W_aᵀ applied to h; 0 before the first token.
    """

    mixer: Any
    previous: jax.Array

    @property
    def length(self):
        return self.mixer.length

    @property
    def memory(self):
        """The memory of an attention mixer's cache; a recurrent mixer has none."""
        return getattr(self.mixer, "memory", None)


class ShiftEditor(nnx.Module):
    """h [B,T,d_model] -> (h̃ [B,T,d_model] in `dtype`, the compute dtype; the next `previous` or None).

    `previous` [B,2r], of a `ShiftedCache`, belongs to the token before the first one; each row then holds one document,
    with padding on either side. W_b [d,r], W_a [2d,r], in two halves, and W_c [r,d] have 4 d r parameters. Only the 2r
    numbers W_bᵀ h_{t−1} and the earlier half of W_aᵀ are shifted, and go from device to device where a sequence is
    spread over several. At padding h̃ = h. Cost: 8 d r FLOPs per token.
    """

    def __init__(self, d_model: int, rank: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        down = lambda fan_in: kernel(rngs, (d_model, rank), ("embed", "rank"), fan_in=fan_in)
        self.information = down(d_model)
        self.gate_of_previous, self.gate_of_current = down(2 * d_model), down(2 * d_model)
        self.out = nnx.Param(jnp.zeros((rank, d_model), jnp.float32), axes=("rank", "embed"), compute=True)
        self.rank, self.dtype = rank, jnp.dtype(dtype)

    def __call__(self, h, *, segment_ids=None, previous=None):
        real = clear_padding(h.astype(self.dtype), segment_ids)
        of_low_rank = lambda weight: product_of_low_rank(real, weight, self.dtype)
        shifted = jnp.concatenate([of_low_rank(self.information), of_low_rank(self.gate_of_previous)], axis=-1)
        if previous is None:
            before = over_previous_tokens(_previous, 1, shifted, segment_ids)
        else:
            before = _previous(shifted, segment_ids, previous)
            previous = last_real_token(shifted, segment_ids, previous)
        information, gate = jnp.split(before, 2, axis=-1)
        passed = information * jax.nn.relu(gate + of_low_rank(self.gate_of_current))
        return h.astype(self.dtype) + product_of_low_rank(passed, self.out, self.dtype), previous

    def flops_per_token(self) -> float:
        """8 d_model r: four products with kernels [d_model, r]."""
        return product_flops(self.information, self.gate_of_previous, self.gate_of_current, self.out)


def _previous(x, segment_ids, first=None):
    """x [B,T,n] of each token's predecessor in its segment; 0, or `first` [B,n], at the first token of a segment."""
    nothing, one = jnp.zeros((1,), jnp.float32), jnp.ones((1,), jnp.float32)
    first = None if first is None else first[:, None]
    return ops.shift_mix(x[:, :, None], nothing, one, segment_ids=segment_ids, last=first)[:, :, 0]
