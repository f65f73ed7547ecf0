"""DeltaFormer: attention over values u that the delta rule has corrected, in the feature space of a similarity κ₁.

    u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i          write: strictly causal
    o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i                          read: causal, the diagonal included
    y_t = o_t W_o

With a window, both sums are over the tokens that t sees (`visible.py`): those of the window, and behind it a document's
first tokens and separators.

k, v, q and w are a token's key, value, read query and write query. α and β are gates, by default in [0, 1].
Source: Xu et al., "DeltaFormer: unlock the state space of Transformer", NeurIPS 2025, eq. 8 and 9; Zhong et al.,
arXiv 2505.19488; separators: Chen et al., SepLLM, arXiv 2412.12094.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.config.checks import check_argument
from deltaformer_jax.layers.bias.position_bias import position_bias_of
from deltaformer_jax.layers.caches import AttentionCache
from deltaformer_jax.layers.gates import OutputGate
from deltaformer_jax.layers.linear import Gate, kernel, product_flops, product_into_stream
from deltaformer_jax.layers.mixers.visible import check_keep, check_visible, mean_tokens_seen, tokens_last
from deltaformer_jax.layers.norms import RMSNorm, rms_normalize
from deltaformer_jax.layers.padding import clear_padding, default_positions
from deltaformer_jax.layers.query_key_value import QueryKeyValue
from deltaformer_jax.layers.rotary import check_rotary
from deltaformer_jax.layers.short_convolution import ShortConvolution
from deltaformer_jax.ops.common.similarity import (
    SelfAdjust,
    Similarity,
    Softmax,
    as_similarity,
    as_write_similarity,
    without_arrays,
)
from deltaformer_jax.sharding import over_devices


def _fixed(name: str, similarity) -> Similarity:
    """`similarity` as an object. Raises ValueError if it holds arrays.

    A mixer's attributes are parameters or static values; an array inside a similarity would be neither.
    """
    similarity = (as_write_similarity if name == "write_similarity" else as_similarity)(similarity, name)
    if without_arrays(similarity)[1]:
        raise ValueError(
            f"{name}={similarity.given!r} holds arrays: a mixer takes similarities that hold plain numbers only"
        )
    return similarity


class DeltaFormer(nnx.Module):
    """A DeltaFormer mixer with H = num_heads query heads and G = num_kv_heads key and value heads of head dimension K.

        DeltaFormer(d_model=256, num_heads=4, num_kv_heads=2, head_dim=64, rngs=nnx.Rngs(0))

    Args:
      write_query: w. "key": w = k, the delta rule proper; the query heads of one KV head share u. "query": w = q.
        "projected": w = x W_w, with the same norm and rotation as the queries. u, α and β have G heads for "key" and H
        heads otherwise.
      write_similarity, read_similarity: κ₁ and κ₂. "linear", "relu", "exp", "softmax", "round", or a similarity object
        such as `ops.Round(decimals)`; the read also "self_adjust" and "self_adjust_basic", see `ops.SelfAdjust`.
      write_scale: factor on the scores of κ₁. None: 1 if the write's keys are normalised (`write_key_norm`), else
        K^-1/2.
      read_scale: factor on the scores q·k of κ₂. None: K^-1/2.
      write_key_norm: "off": κ₁ is applied to write_scale · w·k. "on": κ₁ is applied to write_scale · cos(w, k). "auto":
        "off" for a softmax write, "on" for the others. Their rows are not normalised: with long keys each write would
        remove more than the memory holds, and u would explode. Write and read share the keys, so "on" scales every key
        to length √K, not 1. The read's scores q·k K^-1/2 then keep their usual size; with unit keys they would be √K
        times smaller, too small to tell tokens apart.
      alpha: "off": α = 1. "sigmoid": the sigmoid of a projection of x with bias, in float32.
      beta: "sigmoid" or "raw": a projection of x with bias, in float32, with or without the sigmoid. "one": β = 1. A
        raw β above 1 lets u grow geometrically; "raw" exists to load weights from other implementations.
      beta_bias: whether β's projection has a bias.
      window: a token sees, in its write and its read, itself and the window − 1 tokens before it. None: all before it.
      initial_tokens: how many first tokens of a document all its tokens see, behind the window too.
      separator_tokens: ids of tokens that all later ones see, behind the window too. The caller looks for them: see
        `keep` of the call.
      rope_base: base of the rotary embedding of q, k and a projected w; None: none.
      write_rope_base: another base for the write's scores w·k; None: no rotary embedding there, so that the write
        compares contents wherever they stand. "rope_base": the same. With another one a token has two keys, side by
        side in one twice as wide, of which each query meets one: w is filled up with zeros behind, q in front. The
        scores' products, and the keys in the cache, are then twice as wide.
      qkv_bias: biases on q, k and v.
      rotary_fraction: the fraction of each head's features that is rotated, its first ones.
      rope_scaling: of the rotary embedding, for longer contexts: "none", "linear:4", "yarn:4,4096", ...; see
        `config/rope_scaling.py`.
      qk_norm_epsilon: None: norm_epsilon. qk_norm_over: "head"; "all_heads": one norm over all heads of a token.
      norm_gain: "scale" or "one_plus_scale", see `RMSNorm`.
      qk_norm: RMSNorm of each head of q, k and a projected w.
      kv_shift: mix each key and value with the previous token's, see `kv_shift.py`. kv_shift_window: over how many
        tokens, the token itself included. kv_shift_parts: "both", "key" or "value".
      position_bias: a trained bias of scores by position: "none", "kerple" or "fire". fire_length: where FIRE's L
        starts, in tokens. dape_dim: hidden features of DAPE, 0: none (`bias/position_bias.py`).
      position_bias_in: of whose scores: "read", "write", or "both", each with its own numbers. Those of the write are
        for u's heads, G for w = k and else H.
      conv_size: width in tokens of short convolutions (with SiLU) of q, k, v and a projected w, before their norms and
        rotations, see `short_convolution.py`; 0: none.
      output_gate: multiply o_t by sigmoid(x_t W_g) before W_o.
      output_scale: factor on the output kernel's initial values.
      chunk_size, implementation: passed to `ops.delta_attention`.
      dtype: of the activations and matrix products. Parameters, gates, norms and similarities are float32.

    Raises ValueError naming the argument, for sizes that don't fit each other and for unknown names.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        write_query: str = "key",
        write_similarity: str | Similarity = "softmax",
        read_similarity: str | Similarity = "softmax",
        write_scale: float | None = None,
        read_scale: float | None = None,
        write_key_norm: str = "auto",
        alpha: str = "off",
        beta: str = "sigmoid",
        beta_bias: bool = True,
        window: int | None = None,
        initial_tokens: int = 0,
        separator_tokens: tuple[int, ...] = (),
        rope_base: float | None = 10_000.0,
        write_rope_base: float | str | None = "rope_base",
        qk_norm: bool = False,
        kv_shift: bool = False,
        kv_shift_window: int = 2,
        kv_shift_parts: str = "both",
        conv_size: int = 0,
        output_gate: bool = False,
        norm_epsilon: float = 1e-6,
        qk_norm_epsilon: float | None = None,
        qk_norm_over: str = "head",
        norm_gain: str = "scale",
        qkv_bias: bool = False,
        rotary_fraction: float = 1.0,
        rope_scaling: str = "none",
        position_bias: str = "none",
        fire_length: int = 512,
        dape_dim: int = 0,
        position_bias_in: str = "read",
        output_scale: float = 1.0,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = dict(write_query=write_query, write_key_norm=write_key_norm, alpha=alpha, beta=beta)
        options |= dict(position_bias_in=position_bias_in)
        for name, value in options.items():
            check_argument(name, value)
        self.separator_tokens = check_visible(window, initial_tokens, separator_tokens)
        self.window, self.initial_tokens = window, initial_tokens
        self.write_similarity = _fixed("write_similarity", write_similarity)
        self.read_similarity = _fixed("read_similarity", read_similarity)
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
        if isinstance(write_rope_base, str) and write_rope_base != "rope_base":
            raise ValueError(f'write_rope_base={write_rope_base!r}: give a number, None, or "rope_base" for the same')
        self.write_base = rope_base if write_rope_base == "rope_base" else write_rope_base
        self.two_keys = self.write_base != rope_base
        if self.two_keys and self.write_base is not None:
            check_rotary(head_dim, self.write_base, rotary_fraction, rope_scaling, "write_rope_base")
        projected = write_query == "projected"
        self.write_kernel = (
            kernel(rngs, (d_model, num_heads, head_dim), ("embed", "heads", "head_dim")) if projected else None
        )
        self.write_convolution = (
            ShortConvolution(conv_size, num_heads, head_dim, rngs=rngs) if projected and conv_size else None
        )
        if projected and (qk_norm_over != "head" or qkv_bias):
            raise ValueError(
                'write_query="projected" has neither a bias nor a norm over all heads: use "key" or "query"'
            )
        epsilon = norm_epsilon if qk_norm_epsilon is None else qk_norm_epsilon
        self.write_norm = (
            RMSNorm(head_dim, epsilon=epsilon, axis="head_dim", gain=norm_gain) if projected and qk_norm else None
        )
        self.u_heads, u_axis = (num_kv_heads, "kv_heads") if write_query == "key" else (num_heads, "heads")
        self.alpha_gate = Gate(d_model, self.u_heads, axis=u_axis, rngs=rngs) if alpha == "sigmoid" else None
        self.beta_gate = Gate(d_model, self.u_heads, axis=u_axis, bias=beta_bias, rngs=rngs) if beta != "one" else None
        self.beta_is_raw = beta == "raw"
        self.output = kernel(
            rngs,
            (num_heads, head_dim, d_model),
            ("heads", "head_dim", "embed"),
            fan_in=num_heads * head_dim,
            scale=output_scale,
        )
        if position_bias_in != "read" and position_bias == "none":
            raise ValueError(f'position_bias_in={position_bias_in!r} needs position_bias="kerple" or "fire"')
        bias = lambda heads, axis: position_bias_of(
            position_bias, None, heads, fire_length, dape_dim, axis=axis, rngs=rngs
        )
        self.read_bias = bias(num_heads, "heads") if position_bias_in != "write" else None
        self.write_bias = bias(self.u_heads, u_axis) if position_bias_in != "read" else None
        self.output_gate = OutputGate(d_model, num_heads, head_dim, dtype=dtype, rngs=rngs) if output_gate else None
        softmax_write = isinstance(self.write_similarity, Softmax)
        self.unit_keys = write_key_norm == "on" or (write_key_norm == "auto" and not softmax_write)
        if self.unit_keys:
            # w and k have length √K, so w·k / K is their cosine.
            self.write_scale = (1.0 if write_scale is None else write_scale) / head_dim
        else:
            self.write_scale = head_dim**-0.5 if write_scale is None else write_scale
        self.read_scale = head_dim**-0.5 if read_scale is None else read_scale
        self.d_model, self.num_heads, self.num_kv_heads, self.head_dim = d_model, num_heads, num_kv_heads, head_dim
        self.write_query, self.chunk_size, self.implementation = write_query, chunk_size, implementation
        self.qkv_bias, self.dtype = qkv_bias, jnp.dtype(dtype)

    def __call__(self, x, *, segment_ids=None, positions=None, cache: AttentionCache | None = None, keep=None):
        """x [B,T,d_model] -> (y [B,T,d_model] in the compute dtype, the updated cache or None).

        `segment_ids` int [B,T]: 0 is padding, whose output is 0; a token sees its own segment only. `positions` int
        [B,T] for the rotary embedding: by default the index among the segment's real tokens, counted on from the tokens
        in the cache. `keep` bool [B,T], with separator_tokens: True where a token is one of them. Cost:
        `flops_per_token`; memory: see `ops.delta_attention`.
        """
        check_keep(self.separator_tokens, keep)
        x = clear_padding(x, segment_ids)
        if positions is None:
            positions = default_positions(x, segment_ids, cache)
        tails = (None, None) if cache is None else (cache.tail, cache.write_tail)
        query, key, value, write_query, (tail, write_tail), mapped = self._scored(x, positions, segment_ids, *tails)
        attend = functools.partial(
            ops.delta_attention,
            write_similarity=self.write_similarity,
            read_similarity=self.read_similarity,
            write_scale=self.write_scale,
            read_scale=self.read_scale,
            window=self.window,
            initial=self.initial_tokens,
            padding_is_zero=not self.qkv_bias,  # without biases it is, because x is
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        arrays = dict(
            query=query, key=key, value=value, alpha=self._alpha(x), beta=self._beta(x), segment_ids=segment_ids
        )
        if keep is not None:
            arrays["keep"] = keep
        if isinstance(write_query, str):
            attend = functools.partial(attend, write_query=write_query)
        else:
            arrays["write_query"] = write_query
        biases = dict(write_bias=self.write_bias, read_bias=self.read_bias)
        arrays |= {name: bias() for name, bias in biases.items() if bias is not None}
        if cache is None:
            read = over_devices(attend, arrays)
        else:
            read, memory = attend(**arrays, cache=cache.memory, return_cache=True)
            cache = AttentionCache(memory, tail, write_tail)
        if self.output_gate is not None:
            read = self.output_gate(read, mapped[-1])
        return product_into_stream(read, self.output, self.dtype, axes=2), cache

    def _scored(self, x, positions, segment_ids, tail, write_tail):
        """(q, k, v, w or the name by which `ops.delta_attention` takes it, the tails for the next call, products of x).

        q, k and w are those that scores are made of: normalised, turned and, if a token has two keys, side by side. The
        last of the products is that of the output gate, if there is one.
        """
        gate = None if self.output_gate is None else self.output_gate.kernel
        beside = [kernel for kernel in (self.write_kernel, gate) if kernel is not None]
        query, key, value, tail, mapped = self.inputs(
            x, positions=positions, segment_ids=segment_ids, tail=tail, beside=beside, turned=not self.two_keys
        )
        write_query, write_tail = self._write_query(mapped, query, positions, segment_ids, write_tail)
        if self.two_keys:
            query, key, write_query = self._side_by_side(query, key, write_query, positions)
        elif self.unit_keys:
            key = rms_normalize(key)
        return query, key, value, write_query, (tail, write_tail), mapped

    def _write_query(self, mapped, query, positions, segment_ids, tail):
        """(w, or the name by which `ops.delta_attention` takes it; the tail of w's convolution or None).

        A projected w is made of the first of `mapped`, x W_w. If the token has two keys, a query or key is not turned
        here, and so not normalised: `_side_by_side` does both.
        """
        if self.write_query == "key":
            return "key", None  # if the write's keys are normalised, `_scored` does it
        if self.write_query == "query":
            return rms_normalize(query) if self.unit_keys and not self.two_keys else "query", None
        write_query = mapped[0]
        if self.write_convolution is not None:
            write_query, tail = self.write_convolution(write_query, segment_ids=segment_ids, tail=tail)
        if self.write_norm is not None:
            write_query = self.write_norm(write_query)
        if self.write_base is not None:
            write_query = self.inputs.rotated(write_query, positions, self.write_base)
        return rms_normalize(write_query) if self.unit_keys else write_query, tail

    def _side_by_side(self, query, key, write_query, positions):
        """(q, k, w) of width 2K, from q and k that are not turned yet: k is the write's key and then the read's, w has
        zeros for the read's and q for the write's. Zeros add nothing, so that w·k and q·k are those of one key each.
        """
        turned = lambda y, base: y if base is None else self.inputs.rotated(y, positions, base)
        if isinstance(write_query, str):
            write_query = turned(key if write_query == "key" else query, self.write_base)
            write_query = rms_normalize(write_query) if self.unit_keys else write_query
        keys = [turned(key, base) for base in (self.write_base, self.inputs.rope_base)]
        if self.unit_keys:
            keys = [rms_normalize(one) for one in keys]
        query = turned(query, self.inputs.rope_base)
        sides = (jnp.zeros_like(query), query), keys, (write_query, jnp.zeros_like(write_query))
        return (jnp.concatenate(side, axis=-1) for side in sides)

    def _alpha(self, x):
        return None if self.alpha_gate is None else jax.nn.sigmoid(self.alpha_gate(x))

    def _beta(self, x):
        if self.beta_gate is None:
            return None
        return self.beta_gate(x) if self.beta_is_raw else jax.nn.sigmoid(self.beta_gate(x))

    def compared(self, x, *, segment_ids, positions) -> dict[str, dict[str, jax.Array]]:
        """{"read": ..., "write": ...}, each where its similarity is softmax and has no position bias: the query
        [B,T,heads,K] with the scale in it and the key [B,T,G,K] that its scores are made of; 2K wide if a token has two
        keys."""
        x = clear_padding(x, segment_ids)
        query, key, _, write_query, _, _ = self._scored(x, positions, segment_ids, None, None)
        found = {}
        if isinstance(self.read_similarity, Softmax) and self.read_bias is None:
            found["read"] = {"query": query.astype(jnp.float32) * self.read_scale, "key": key}
        if isinstance(self.write_similarity, Softmax) and self.write_bias is None:
            if isinstance(write_query, str):
                write_query = key if write_query == "key" else query
            found["write"] = {"query": write_query.astype(jnp.float32) * self.write_scale, "key": key}
        return found

    def in_places(self, memory: ops.SelectedKUCache) -> ops.SelectedKUCache:
        """The cache with its entries numbered by their places: `ops.in_places`, where each of two keys side by side has
        the rotation of its own base."""
        base = self.inputs.rope_base

        def turn(key, by):
            if not self.two_keys:
                return self.inputs.moved(key, by, base)
            sides = zip(jnp.split(key, 2, axis=-1), (self.write_base, base))
            return jnp.concatenate([self.inputs.moved(side, by, own) for side, own in sides], axis=-1)

        return ops.in_places(memory, turn)

    def folded(self, memory: ops.SelectedKUCache, keep) -> ops.SelectedKUCache:
        """The cache with what `keep` drops folded into the segments' separators: `ops.fold_segments`, by the keys that
        the read compares."""
        read = memory
        if self.two_keys:
            read = memory.with_arrays(key_by_head=memory.key_by_head[..., self.head_dim :])
        read = ops.fold_segments(read, keep, read_similarity=self.read_similarity, read_scale=self.read_scale)
        return memory.with_arrays(value_by_head=read.value_by_head)

    @property
    def tied(self) -> bool:
        """Whether write and read have the same scores (w = q, both softmax, equal scales, no position bias), and
        nothing lasts behind the window.

        The op then computes both in one pass over the keys.
        """
        both_softmax = isinstance(self.write_similarity, Softmax) and isinstance(self.read_similarity, Softmax)
        same_scores = self.write_query == "query" and not self.unit_keys and self.write_scale == self.read_scale
        unbiased = self.read_bias is None and self.write_bias is None
        return both_softmax and same_scores and unbiased and not tokens_last(self) and not self.two_keys

    def init_cache(self, batch: int, capacity: int) -> AttentionCache:
        """An empty cache for `capacity` tokens per row. It holds k, or both keys, and u; v is not needed again.

        With a window it is a ring of at most `window` slots. If tokens stay visible behind the window it has a slot for
        each token; `ops.compact_cache` may drop those that are seen no more.
        """
        lasts = tokens_last(self)
        slots = capacity if self.window is None or lasts else min(capacity, self.window)
        kind = ops.SelectedKUCache if lasts else ops.KUCache
        width = self.head_dim * (1 + self.two_keys)
        memory = kind.empty(batch, slots, self.num_kv_heads, self.u_heads, width, self.head_dim, self.dtype)
        convolution = self.write_convolution
        write_tail = None if convolution is None else convolution.empty_tail(batch, self.dtype)
        return AttentionCache(memory, self.inputs.empty_tail(batch), write_tail)

    def flops_per_token(self, length: int) -> float:
        """2 d_model K (2 H + 2 G) + gates + convolutions + write + read: forward FLOPs per token.

        This is the mean over a sequence of `length` tokens. A multiply-add counts 2; norms and sigmoids are not
        counted.

        * gates: 2 d_model Hu for each of α and β; 2 d_model H K for a projected w, and again for an output gate.
        * read: 4 H K n (scores, and weights times u). n is the mean number of tokens that a token sees, length/2 or,
          with a window, less (`mean_tokens_seen`; separators behind it are not counted). With first tokens or
          separators beside a position bias or a self-adjusted read it is length/2 again: the op then computes all
          scores and masks them.
        * write: 4 Hu K n, or 0 if it shares the read's pass (`tied`).
        * half as much again for both if a token has two keys (`write_rope_base`), as scores are then twice as wide.
        * a position bias: 32 H length for FIRE, 3 H dape_dim length for DAPE; of the write, Hu in place of H.

        Hu is G for w = k, else H. The solve inside each chunk, O(chunk_size) per token, is not counted.
        """
        projections = self.inputs.flops_per_token() + product_flops(self.write_kernel, self.output)
        if self.write_convolution is not None:
            projections += product_flops(self.write_convolution.weight)
        if self.output_gate is not None:
            projections += self.output_gate.flops_per_token()
        gates = 2.0 * self.d_model * self.u_heads * ((self.alpha_gate is not None) + (self.beta_gate is not None))
        passes = self.num_heads + (0 if self.tied else self.u_heads)
        biases = [bias.flops_per_pair() for bias in (self.write_bias, self.read_bias) if bias is not None]
        plain = not biases and not isinstance(self.read_similarity, SelfAdjust)
        seen = mean_tokens_seen(length, self.window if plain or not tokens_last(self) else None, self.initial_tokens)
        each = (3.0 if self.two_keys else 2.0) * passes * self.head_dim * 2 + sum(biases)
        return projections + gates + each * seen
