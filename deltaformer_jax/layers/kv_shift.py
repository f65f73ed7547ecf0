"""KV shifting: each KV head mixes its key and value with the previous token's.

    k'_t = a₁ k_t + a₂ k_{t−1},      v'_t = b₁ v_t + b₂ v_{t−1}

At the first token of a segment k_{t−1} = v_{t−1} = 0. The shift comes before the rotary embedding. It has four scalars
per KV head. a₁ and b₁ start uniform in (0, 1), with a₂ = 1 − a₁ and b₂ = 1 − b₁; training does not keep these sums.
Source: Xu et al., "KV Shifting Attention Enhances Language Modeling", arXiv 2411.19574.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.sharding import over_previous_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShiftTail:
    """The last real token's key [B,G,K] and value [B,G,V] before mixing, for the first token of the next call."""

    key: jax.Array
    value: jax.Array


class KVShift(nnx.Module):
    """(k [B,T,G,K], v [B,T,G,V]) -> (k', v', tail) in their own dtypes; pass `tail` to the call with the next tokens.

    The scalars are float32 and get no weight decay. Cost: two multiply-adds per feature.
    """

    def __init__(self, num_kv_heads: int, *, rngs: nnx.Rngs):
        def uniform():
            return jax.random.uniform(rngs.params(), (num_kv_heads,), jnp.float32)

        def scalars(value):
            return nnx.Param(value, axes=("kv_heads",), decay=False)

        key, value = uniform(), uniform()
        self.current_key, self.previous_key = scalars(key), scalars(1.0 - key)
        self.current_value, self.previous_value = scalars(value), scalars(1.0 - value)

    def __call__(self, key, value, *, segment_ids=None, tail: ShiftTail | None = None):
        scalars = [x[...] for x in (self.current_key, self.previous_key, self.current_value, self.previous_value)]
        if tail is None:
            mixed = lambda both, segment_ids: _mixed(both, segment_ids, scalars)
            return *over_previous_tokens(mixed, 1, (key, value), segment_ids), None
        mixed = _mixed((key, value), segment_ids, scalars, last=(tail.key, tail.value))
        last = (last_real_token(x, segment_ids, old) for x, old in zip((key, value), (tail.key, tail.value)))
        return *mixed, ShiftTail(*last)


def _mixed(key_and_value, segment_ids, scalars, last=(None, None)):
    """(k', v') from (k, v) and the four scalars a₁, a₂, b₁, b₂ of each head."""
    pairs = zip(key_and_value, (scalars[:2], scalars[2:]), last)
    return tuple(ops.shift_mix(x, *pair, segment_ids=segment_ids, last=before) for x, pair, before in pairs)


def last_real_token(x, segment_ids, otherwise):
    """x [B,T,...] at each row's last real token (segment id not 0): [B,...] in the dtype of `otherwise`.

    A row without a real token gets its row of `otherwise` [B,...].
    """
    if segment_ids is None:
        return x[:, -1].astype(otherwise.dtype)
    steps = jnp.arange(x.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(segment_ids != 0, steps, -1), axis=1)
    tail = x[jnp.arange(x.shape[0]), jnp.maximum(last, 0)].astype(otherwise.dtype)
    return jnp.where((last >= 0).reshape((-1,) + (1,) * (tail.ndim - 1)), tail, otherwise)
