"""KV shifting: each KV head mixes its key and value with the previous token's.

    k'_t = a₁ k_t + a₂ k_{t−1},      v'_t = b₁ v_t + b₂ v_{t−1}

At the first token of a segment k_{t−1} = v_{t−1} = 0. The shift comes before the rotary embedding. It has four scalars
per KV head. a₁ and b₁ start uniform in (0, 1), with a₂ = 1 − a₁ and b₂ = 1 − b₁; training does not keep these sums.

A window of W tokens instead of two gives W scalars each, k'_t = Σ_{j≤W} a_j k_{t+1−j}. All but the last start uniform
in (0, 1), the last as 1 minus their sum. The paper found windows of 3 and 4 no better, and shifting only the keys or
only the values worse (its Figure 8).
Source: Xu et al., "KV Shifting Attention Enhances Language Modeling", arXiv 2411.19574.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.config.checks import check_argument
from deltaformer_jax.layers.short_convolution import weighted_sum
from deltaformer_jax.sharding import over_previous_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShiftTail:
    """The last real tokens' keys and values before mixing, for the first tokens of the next call.

    With a window of two each is [B,G,K], of the last token; with a window of W it is [B,W−1,G,K], the newest last.
    """

    key: jax.Array
    value: jax.Array


class KVShift(nnx.Module):
    """(k [B,T,G,K], v [B,T,G,V]) -> (k', v', tail) in their own dtypes; pass `tail` to the call with the next tokens.

    `window`: W, at least 2. `parts`: "both", or only the "key" or only the "value"; the other one passes unchanged and
    its scalars are None. The scalars [G], and from W = 3 on those of older tokens [W−2,G], are float32 and have no
    weight decay. Cost: W multiply-adds per feature. Raises ValueError, naming the argument, for another window or part.
    """

    def __init__(self, num_kv_heads: int, *, window: int = 2, parts: str = "both", rngs: nnx.Rngs):
        check_argument("kv_shift_window", window)
        check_argument("kv_shift_parts", parts)

        def uniform(*shape):
            return jax.random.uniform(rngs.params(), (*shape, num_kv_heads), jnp.float32)

        def scalars(value, axes=("kv_heads",)):
            return nnx.Param(value, axes=axes, decay=False)

        def mixed(name):
            """The scalars of one part: of the token itself, of the previous one, and of those before it."""
            first = uniform()
            if parts not in ("both", name):
                return None, None, None
            if window == 2:
                return scalars(first), scalars(1.0 - first), None
            others = uniform(window - 2)
            older = jnp.concatenate([others[1:], 1.0 - first[None] - jnp.sum(others, axis=0, keepdims=True)])
            return scalars(first), scalars(others[0]), scalars(older, ("conv", "kv_heads"))

        self.current_key, self.previous_key, self.older_key = mixed("key")
        self.current_value, self.previous_value, self.older_value = mixed("value")
        self.window = window

    def __call__(self, key, value, *, segment_ids=None, tail: ShiftTail | None = None):
        scalars = [
            [None if x is None else x[...] for x in part]
            for part in (
                (self.current_key, self.previous_key, self.older_key),
                (self.current_value, self.previous_value, self.older_value),
            )
        ]
        if tail is None:
            mixed = lambda both, segment_ids: self._mixed(both, segment_ids, scalars)
            return *over_previous_tokens(mixed, self.window - 1, (key, value), segment_ids), None
        if self.window == 2:
            mixed = self._mixed((key, value), segment_ids, scalars, last=(tail.key, tail.value))
            last = (last_real_token(x, segment_ids, old) for x, old in zip((key, value), (tail.key, tail.value)))
            return *mixed, ShiftTail(*last)
        key, key_tail = _wide(key, segment_ids, scalars[0], tail.key)
        value, value_tail = _wide(value, segment_ids, scalars[1], tail.value)
        return key, value, ShiftTail(key_tail, value_tail)

    def _mixed(self, key_and_value, segment_ids, scalars, last=(None, None)):
        """(k', v') from (k, v) and their scalars."""
        if self.window > 2:
            return tuple(_wide(x, segment_ids, part)[0] for x, part in zip(key_and_value, scalars))
        return tuple(
            x if current is None else ops.shift_mix(x, current, previous, segment_ids=segment_ids, last=before)
            for x, (current, previous, _), before in zip(key_and_value, scalars, last)
        )

    def empty_tail(self, batch: int, head_dim: int, dtype) -> ShiftTail:
        """The tail before the first token: zeros."""
        scalars = self.current_value if self.current_key is None else self.current_key
        older = () if self.window == 2 else (self.window - 1,)
        zeros = jnp.zeros((batch, *older, scalars.shape[-1], head_dim), dtype)
        return ShiftTail(zeros, zeros)


def _wide(x, segment_ids, scalars, tail=None):
    """(Σ_j a_j x_{t+1−j} in x's dtype, the next tail) of a window above two; x itself without scalars."""
    current, previous, older = scalars
    if current is None:
        return x, tail
    total, tail = weighted_sum(x, jnp.stack([current, previous, *older])[..., None], segment_ids, tail)
    return total.astype(x.dtype), tail


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
