"""Softmax attention, the ordinary Transformer's mixer.

    o_t = Σ_{t−window < i ≤ t} softmax_i(q_t · k_i / √K) v_i,        y_t = o_t W_o

Options:
* first tokens and separators stay visible behind the window (`visible.py`);
* forgetting gate: Σ_{i<l≤t} log sigmoid(x_l W_f + b) is added to the score of token i, with separate gates per query
  head;
* ALiBi: −m_h (t − i) is added to the score of token i, with m_h = 2^(−8 h/H) for h = 1 … H (`alibi_slopes`);
* a trained bias by position: Kerple or FIRE, and DAPE's change of it or of ALiBi (`bias/position_bias.py`);
* sinks: each query head has one more score, a trained number, whose value vector is 0;
* self-adjusted softmax in the place of softmax, see `ops.SelfAdjust`;
* output gate: o_t is multiplied by sigmoid(x_t W_g).

Source: Vaswani et al., arXiv 1706.03762, eq. 1; grouped queries: Ainslie et al., arXiv 2305.13245; forgetting gate: Lin
et al., arXiv 2503.02130; ALiBi: Press et al., arXiv 2108.12409; sinks: Xiao et al., arXiv 2309.17453; separators: Chen
et al., SepLLM, arXiv 2412.12094; self-adjusted softmax: arXiv 2502.18277.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.layers.bias.position_bias import position_bias_of
from deltaformer_jax.layers.caches import AttentionCache
from deltaformer_jax.layers.gates import OutputGate
from deltaformer_jax.layers.linear import Gate, kernel, product_flops, product_into_stream
from deltaformer_jax.layers.mixers.visible import check_keep, check_visible, mean_tokens_seen, tokens_last
from deltaformer_jax.layers.padding import clear_padding, default_positions
from deltaformer_jax.layers.query_key_value import QueryKeyValue
from deltaformer_jax.ops.common.similarity import Softmax
from deltaformer_jax.ops.softmax.api import check_read
from deltaformer_jax.sharding import over_devices


class SoftmaxAttention(nnx.Module):
    """Causal softmax attention with H = num_heads query heads and G = num_kv_heads key and value heads of dimension K.

        SoftmaxAttention(d_model=256, num_heads=4, num_kv_heads=2, head_dim=64, rngs=nnx.Rngs(0))

    Args:
      window: W: a token sees itself and the W − 1 tokens before it. None: itself and all tokens before it.
      initial_tokens: how many first tokens of a document all its tokens see, behind the window too.
      separator_tokens: ids of tokens that all later ones see, behind the window too. The caller looks for them: see
        `keep` of the call.
      read_similarity: "softmax", "self_adjust", "self_adjust_basic" or an `ops.SelfAdjust`; sinks need "softmax".
      rope_base: base of the rotary embedding of q and k; None: none.
      qkv_bias: biases on q, k and v.
      rotary_fraction: the fraction of each head's features that is rotated, its first ones.
      rope_scaling: of the rotary embedding, for longer contexts: "none", "linear:4", "yarn:4,4096", ...; see
        `config/rope_scaling.py`.
      qk_norm_epsilon: None: norm_epsilon. qk_norm_over: "head"; "all_heads": one norm over all heads of a token.
      norm_gain: "scale" or "one_plus_scale", see `RMSNorm`.
      qk_norm: RMSNorm of each query and key head.
      kv_shift: mix each key and value with the previous token's, see `kv_shift.py`. kv_shift_window: over how many
        tokens, the token itself included. kv_shift_parts: "both", "key" or "value".
      forget_gate, alibi, sinks, output_gate: the options in this module's docstring. The forgetting gate starts around
        1/2. ALiBi is meant for queries and keys without a rotary embedding.
      position_bias: "none", "kerple" or "fire", meant for the same. fire_length: where FIRE's L starts, in tokens.
      dape_dim: hidden features of DAPE, 0: none; its static bias is position_bias or ALiBi.
      conv_size: width in tokens of short convolutions (with SiLU) of q, k and v, see `short_convolution.py`; 0: none.
      output_scale: factor on the output kernel's initial values.
      implementation: passed to `ops.causal_attention`.
      dtype: of the activations and matrix products. Parameters, softmax and the sigmoids of gates are float32.

    Raises ValueError naming the argument, for sizes that don't fit each other.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        initial_tokens: int = 0,
        separator_tokens: tuple[int, ...] = (),
        read_similarity: str | ops.SelfAdjust = "softmax",
        rope_base: float | None = 10_000.0,
        qk_norm: bool = False,
        kv_shift: bool = False,
        kv_shift_window: int = 2,
        kv_shift_parts: str = "both",
        forget_gate: bool = False,
        alibi: bool = False,
        position_bias: str = "none",
        fire_length: int = 512,
        dape_dim: int = 0,
        sinks: bool = False,
        conv_size: int = 0,
        output_gate: bool = False,
        norm_epsilon: float = 1e-6,
        qk_norm_epsilon: float | None = None,
        qk_norm_over: str = "head",
        norm_gain: str = "scale",
        qkv_bias: bool = False,
        rotary_fraction: float = 1.0,
        rope_scaling: str = "none",
        output_scale: float = 1.0,
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.separator_tokens = check_visible(window, initial_tokens, separator_tokens)
        self.read_similarity = check_read(read_similarity, sinks, "read_similarity")
        if (position_bias != "none" or dape_dim) and self.read_similarity != Softmax():
            raise ValueError(f"read_similarity={read_similarity!r}: has no position_bias and no dape_dim")
        self.inputs = QueryKeyValue(
            d_model,
            num_heads,
            num_kv_heads,
            head_dim,
            rope_base=rope_base,
            qk_norm=qk_norm,
            kv_shift=kv_shift,
            kv_shift_window=kv_shift_window,
            kv_shift_parts=kv_shift_parts,
            conv_size=conv_size,
            norm_epsilon=norm_epsilon if qk_norm_epsilon is None else qk_norm_epsilon,
            norm_gain=norm_gain,
            qk_norm_over=qk_norm_over,
            qkv_bias=qkv_bias,
            rotary_fraction=rotary_fraction,
            rope_scaling=rope_scaling,
            dtype=dtype,
            rngs=rngs,
        )
        self.output = kernel(
            rngs,
            (num_heads, head_dim, d_model),
            ("heads", "head_dim", "embed"),
            fan_in=num_heads * head_dim,
            scale=output_scale,
        )
        self.forget = Gate(d_model, num_heads, axis="heads", rngs=rngs) if forget_gate else None
        slopes = alibi_slopes(num_heads) if alibi else None
        self.position_bias = position_bias_of(position_bias, slopes, num_heads, fire_length, dape_dim, rngs=rngs)
        self.alibi = alibi and self.position_bias is None
        self.sinks = nnx.Param(jnp.zeros((num_heads,), jnp.float32), axes=("heads",), decay=False) if sinks else None
        self.output_gate = OutputGate(d_model, num_heads, head_dim, dtype=dtype, rngs=rngs) if output_gate else None
        self.d_model, self.num_heads, self.num_kv_heads, self.head_dim = d_model, num_heads, num_kv_heads, head_dim
        self.qkv_bias = qkv_bias
        self.window, self.initial_tokens = window, initial_tokens
        self.implementation, self.dtype = implementation, jnp.dtype(dtype)

    def __call__(self, x, *, segment_ids=None, positions=None, cache: AttentionCache | None = None, keep=None):
        """x [B,T,d_model] -> (y [B,T,d_model] in the compute dtype, the updated cache or None).

        `segment_ids` int [B,T]: 0 is padding, whose output is 0; a token sees its own segment only. `positions` int
        [B,T] for the rotary embedding: by default the index among the segment's real tokens, counted on from the tokens
        in the cache. `keep` bool [B,T], with separator_tokens: True where a token is one of them. Cost:
        `flops_per_token`; memory: see `ops.causal_attention`.
        """
        check_keep(self.separator_tokens, keep)
        x = clear_padding(x, segment_ids)
        if positions is None:
            positions = default_positions(x, segment_ids, cache)
        tail = None if cache is None else cache.tail
        beside = [] if self.output_gate is None else [self.output_gate.kernel]
        query, key, value, tail, gates = self.inputs(
            x, positions=positions, segment_ids=segment_ids, tail=tail, beside=beside
        )
        attend = functools.partial(
            ops.causal_attention,
            similarity=self.read_similarity,
            window=self.window,
            initial=self.initial_tokens,
            padding_is_zero=not self.qkv_bias,  # without biases it is, because x is
            implementation=self.implementation,
        )
        arrays = dict(query=query, key=key, value=value, segment_ids=segment_ids)
        if (log_decay := self._log_decay(x)) is not None:
            arrays["log_decay"] = log_decay
        if keep is not None:
            arrays["keep"] = keep
        if self.sinks is not None:
            arrays["sinks"] = self.sinks[...]
        if self.position_bias is not None:
            arrays["position_bias"] = self.position_bias()
        if cache is None:
            read = over_devices(attend, arrays)
        else:
            read, memory = attend(**arrays, cache=cache.memory, return_cache=True)
            cache = AttentionCache(memory, tail)
        if self.output_gate is not None:
            read = self.output_gate(read, *gates)
        return product_into_stream(read, self.output, self.dtype, axes=2), cache

    def _log_decay(self, x):
        """What each token [B,T,H] takes off the scores of the tokens before it, or None. ALiBi takes off m_h."""
        gate = None if self.forget is None else jax.nn.log_sigmoid(self.forget(x))
        if not self.alibi:
            return gate
        slopes = jnp.asarray(alibi_slopes(self.num_heads), jnp.float32)
        return jnp.broadcast_to(-slopes, (*x.shape[:2], self.num_heads)) if gate is None else gate - slopes[None, None]

    def compared(self, x, *, segment_ids, positions) -> dict[str, dict[str, jax.Array]]:
        """{"read": what the scores are made of}: query [B,T,H,K] with the scale in it, key [B,T,G,K] and, with these
        options, log_decay and sink [B,T,H]. {} unless the similarity is softmax, without a position bias."""
        if self.position_bias is not None or self.read_similarity != Softmax():
            return {}
        x = clear_padding(x, segment_ids)
        query, key, *_ = self.inputs(x, positions=positions, segment_ids=segment_ids)
        read = {"query": query.astype(jnp.float32) * self.head_dim**-0.5, "key": key}
        if (log_decay := self._log_decay(x)) is not None:
            read["log_decay"] = log_decay
        if self.sinks is not None:
            read["sink"] = jnp.broadcast_to(self.sinks[...], (*x.shape[:2], self.num_heads))
        return {"read": read}

    def in_places(self, memory: ops.SelectedKVCache) -> ops.SelectedKVCache:
        """The cache with its entries numbered by their places: `ops.in_places` by this layer's rotation and slopes."""
        slopes = jnp.asarray(alibi_slopes(self.num_heads), jnp.float32) if self.alibi else None
        return ops.in_places(memory, lambda key, by: self.inputs.moved(key, by, self.inputs.rope_base), slopes)

    def folded(self, memory: ops.SelectedKVCache, keep) -> ops.SelectedKVCache:
        """The cache with what `keep` drops folded into the segments' separators: `ops.fold_segments`."""
        return ops.fold_segments(memory, keep)

    def init_cache(self, batch: int, capacity: int) -> AttentionCache:
        """An empty cache for `capacity` tokens per row.

        With a window it is a ring of at most `window` slots. If tokens stay visible behind the window it has a slot for
        each token; `ops.compact_cache` may drop those that are seen no more.
        """
        lasts = tokens_last(self)
        slots = capacity if self.window is None or lasts else min(capacity, self.window)
        decay_heads = self.num_heads if self.alibi or self.forget is not None else None
        kind = ops.SelectedKVCache if lasts else ops.KVCache
        memory = kind.empty(batch, slots, self.num_kv_heads, self.head_dim, self.head_dim, self.dtype, decay_heads)
        return AttentionCache(memory, self.inputs.empty_tail(batch))

    def flops_per_token(self, length: int) -> float:
        """2 d_model K (2 H + 2 G) + gates and convolutions + 4 H K n: forward FLOPs per token. FIRE takes 64 H n more,
        DAPE 6 H dape_dim n.

        n is the mean number of tokens that a token sees, without separators behind its window (`mean_tokens_seen`).
        With first tokens or separators beside a forgetting gate, a position bias or a self-adjusted read it is length/2
        whatever the window: `ops.causal_attention` then computes all scores and masks them. The result is the mean over
        a sequence of `length` tokens; a multiply-add counts 2.
        """
        projections = self.inputs.flops_per_token() + product_flops(self.output)
        projections += 0.0 if self.forget is None else product_flops(self.forget.kernel)
        projections += 0.0 if self.output_gate is None else self.output_gate.flops_per_token()
        plain = self.forget is None and self.position_bias is None and self.read_similarity == Softmax()
        seen = mean_tokens_seen(length, self.window if plain or not tokens_last(self) else None, self.initial_tokens)
        each = 4.0 * self.num_heads * self.head_dim
        each += 0.0 if self.position_bias is None else self.position_bias.flops_per_pair()
        return projections + each * seen


def alibi_slopes(num_heads: int) -> list[float]:
    """m_h of each head: 2^(−8/H), 2^(−16/H), … 2^(−8); of H that is no power of two, those of the largest power below
    it, then every other one of twice that power."""
    power = 1 << (num_heads.bit_length() - 1)
    of = lambda heads: [2.0 ** (-8 * (h + 1) / heads) for h in range(heads)]
    return (of(power) + of(2 * power)[::2])[:num_heads]
