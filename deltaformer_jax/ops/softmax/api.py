"""The public softmax attention op: causal, with optional window, forgetting gate, sinks and KV cache."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from deltaformer_jax.ops.cache.caches import (
    Entries,
    KVCache,
    Selected,
    SelectedKVCache,
    check_cache,
    check_room,
    check_selected,
    lasting_tokens,
    store,
    token_positions,
)
from deltaformer_jax.ops.cache.extension import extend_attention, extend_in_blocks
from deltaformer_jax.ops.common import checks
from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common.compiled import compiled
from deltaformer_jax.ops.common.dispatch import BACKENDS, check_implementation, dispatch
from deltaformer_jax.ops.common.padding import zero_at_padding, zero_gradient_at_padding
from deltaformer_jax.ops.common.similarity import SelfAdjust, Softmax, as_similarity
from deltaformer_jax.ops.common.tiles import accumulation_dtype, default_chunk
from deltaformer_jax.ops.position_bias import BIASED_CHUNK, PositionBias, as_position_bias
from deltaformer_jax.ops.softmax.chunked import Inputs, Plan, attention_chunked
from deltaformer_jax.ops.softmax.definition import (
    attend_biased_parallel,
    attend_biased_recurrent,
    attend_parallel,
    attend_recurrent,
)
from deltaformer_jax.ops.softmax.kernels import bind, order
from deltaformer_jax.ops.softmax.self_adjusted import self_adjusted_chunked

_DEFINITIONS = {"recurrent": attend_recurrent, "parallel": attend_parallel}
_BIASED_DEFINITIONS = {"recurrent": attend_biased_recurrent, "parallel": attend_biased_parallel}


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    similarity: str | SelfAdjust = "softmax",
    scale: float | None = None,
    window: int | None = None,
    keep: jax.Array | None = None,
    initial: int = 0,
    log_decay: jax.Array | None = None,
    sinks: jax.Array | None = None,
    position_bias: PositionBias | None = None,
    segment_ids: jax.Array | None = None,
    padding_is_zero: bool = False,
    implementation: str | None = None,
    cache: KVCache | None = None,
    return_cache: bool = False,
) -> jax.Array | tuple[jax.Array, KVCache]:
    """Causal softmax attention over the last `window` tokens, the token itself included.

        s_ti = scale · q_t·k_i + Σ_{i<l≤t} g_l,          p_ti = e^{s_ti} / (e^{b} + Σ_{t−window<j≤t} e^{s_tj})
        o_t = Σ_i p_ti v_i

    With `position_bias`, b(t, i) is added to s_ti, a function of the positions of both tokens or, as in `ops.Dape`, of
    the scores of all heads too.

    With `keep` or `initial`, t also sees the tokens behind the window that last: i ≤ t is visible if

        t − i < window   or   keep_i   or   (position of i in its segment) < initial

    With another `similarity`, o_t = Σ_i κ_ti v_i. "self_adjust": κ_ti = p_ti (s_ti − m_t) / (M_t − m_t), with m_t and
    M_t the least and the largest of 0 and the visible scores s_tj. "self_adjust_basic": κ_ti = p_ti s_ti.

    g ≤ 0 is the log decay (the forgetting gate). b is the head's sink logit. Without sinks, e^b is replaced by 0.

    Letters: B batch rows, T tokens, H query heads, G key/value heads (H a multiple of G), K and V the head dimensions
    of keys and values.

    Args:
      query: [B, T, H, K], key: [B, T, G, K], value: [B, T, G, V]. All have one dtype: float64, float32, bfloat16 or
        float16.
      similarity: "softmax", "self_adjust" or "self_adjust_basic", without sinks; see `similarity.SelfAdjust`.
      scale: multiplies q·k; None means K ** -0.5.
      window: how many tokens a token sees, itself included; None means all tokens up to and including itself.
      keep: [B, T] bool, True for tokens that all later ones of the segment see, for example separators. It needs a
        window, or a cache of chosen tokens, which remembers them for `streaming_entries`.
      initial: how many tokens at the start of each segment all later ones see. It needs the same.
      log_decay: g [B, T, H] or one number, finite and at most 0: the natural log of the factor by which a token reduces
        the weight of all tokens before it. None means 0.
      sinks: b [H], one logit per head that adds e^b to the normaliser and has value 0; None means no sinks.
      position_bias: `ops.Alibi`, `ops.Kerple`, `ops.Fire`, `ops.Dape`, or one of your own, see
        `ops.position_bias.PositionBias`. Its arrays are [H, …], or [1, …] if all heads share them. Positions count the
        real tokens of a segment from 0, those in the cache included. None means 0.
      segment_ids: [B, T] ints. 0 is padding: the output there is 0, no token sees it, and it may hold anything, NaN
        included. Tokens of one segment have equal ids and are contiguous. A token sees only its own segment.
      padding_is_zero: promises that query, key and value are 0 at padding, as they are in the mixers. They are then not
        set to 0 again, which saves a pass over each. With a given cache it changes nothing.
      implementation: "recurrent" (the definition, token by token), "parallel" (T×T matrices), "chunked" (a scan over
        chunks with a hand-written backward pass), "triton" (NVIDIA GPUs: bfloat16, float16 and float32, head dimensions
        up to 256, no window), "cudnn" (NVIDIA GPUs: bfloat16 and float16, K = V, a multiple of 8 up to 128) or "splash"
        (TPUs: bfloat16, K = V). The last three support none of log_decay, sinks, position_bias, keep, initial and
        another similarity than softmax. None is the default choice: by the platform that the program is compiled for,
        "splash", "triton" if there are segment ids and else "cudnn", if it supports the call ("cudnn" only if this
        process sees an NVIDIA device), else "chunked".
      cache: a KVCache to continue from. With a window, the cache is a ring of `window` slots. With keep or initial it
        must be a SelectedKVCache, whose entries `compact_cache` drops. New tokens with segment id 0 are not stored.
      return_cache: also return the cache after these tokens. Without `cache`, this is a new cache of `window` slots, or
        of T slots if there is no window; with keep or initial a SelectedKVCache of all T tokens.

    Returns:
      o [B, T, H, V] in value's dtype; (o, cache) if `cache` is given or `return_cache` is true.
      Sums are float32 (float64 for float64) inside the op.

    Raises:
      ValueError, TypeError: a shape, dtype, name or size that does not fit (raised while tracing). Also a log_decay
        that is positive or not finite, a segment id that occurs in two separate runs of a row, and a cache without
        room, if their values are known. Under jit they are not known: log_decay is then used as given, separate runs
        give an undefined result, and tokens without room are lost.
      NotImplementedError: the named implementation does not exist for this op, does not support this call or needs
        another platform. Also a second derivative of "chunked".

    Cost: 2 T² K B H floating-point operations, with a window 4 T (window + S) K B H, where S tokens last behind it (all
      of T² if they do beside log_decay, position_bias or a self-adjusted softmax), and 2.5 times as many in the
      backward pass; self-adjusted softmax 1.5 times as many in the forward pass. A position bias costs what it says,
      for each pair of tokens, and in the backward pass three times as much. Memory: O(T (K+V)) per head for "chunked".

    Source: Vaswani et al., arXiv 1706.03762; computed as in Dao et al., arXiv 2205.14135; window as in Beltagy et al.,
      arXiv 2004.05150; forgetting gate: Lin et al., arXiv 2503.02130, eq. 5; sinks and initial: Xiao et al., arXiv
      2309.17453; keep: Chen et al., SepLLM, arXiv 2412.12094; self-adjusted softmax: arXiv 2502.18277.
    """
    checks.check_selection(keep, initial, window, key, isinstance(cache, Selected))
    plan, inputs = checked(query, key, value, scale, window, log_decay, sinks, segment_ids, implementation)
    plan = dataclasses.replace(plan, initial=int(initial), similarity=check_read(similarity, sinks is not None))
    if position_bias is not None:
        if plan.similarity != Softmax():
            raise ValueError(f"similarity={similarity!r}: has no position_bias; leave it out, or take 'softmax'")
        position_bias = as_position_bias(position_bias, query.shape[2], key)
        plan = dataclasses.replace(plan, chunk=min(plan.chunk, BIASED_CHUNK))
    log_decay, segment_ids = inputs.log_decay, inputs.segment_ids
    if cache is not None or return_cache:
        checks.check_one_document(segment_ids)
    if cache is not None:
        decay_heads = None if log_decay is None else query.shape[2]
        cache = check_cache(cache, KVCache, key, value.shape[2], value.shape[3], decay_heads)
        check_selected(cache, keep, initial)
        check_room(cache, segment_ids, key.shape[1], window)
        if implementation in BACKENDS["softmax"]:
            raise NotImplementedError(
                f"implementation={implementation!r} cannot continue from a cache: use None or 'chunked'"
            )
        block = {"recurrent": 1, "parallel": key.shape[1]}.get(implementation, 128)
        return _extend(plan, block, cache, inputs, keep, position_bias)
    return _attend(plan, implementation, return_cache, padding_is_zero, inputs, keep, position_bias)


def check_read(given: str | SelfAdjust, sinks: bool, argument: str = "similarity") -> Softmax | SelfAdjust:
    """The similarity of a read of softmax attention, with or without sinks. Raises ValueError for another one."""
    similarity = as_similarity(given, argument)
    if not isinstance(similarity, Softmax | SelfAdjust):
        raise ValueError(
            f"{argument}={given!r}: softmax attention has 'softmax', 'self_adjust' and 'self_adjust_basic'; the others "
            "are DeltaFormer's (delta_attention, delta_former)"
        )
    if sinks and similarity != Softmax():
        raise ValueError(f"{argument}={given!r}: has no sinks; leave sinks out, or take 'softmax'")
    return similarity


def checked(query, key, value, scale, window, log_decay, sinks, segment_ids, implementation) -> tuple[Plan, Inputs]:
    """The arguments of `causal_attention` as a plan and its inputs. Raises for an argument that does not fit."""
    checks.check_heads(query, key, value)
    check_implementation("softmax", implementation)
    checks.check_size("window", window)
    segment_ids = checks.as_segment_ids(segment_ids, key)
    scale = checks.check_scale("scale", scale, key.shape[3])
    shapes = [(*key.shape[:2], query.shape[2])]
    log_decay = checks.as_log_decay(log_decay, "query heads", shapes, segment_ids, key)
    checks.check_sinks(sinks, query.shape[2])
    plan = Plan(scale, window, default_chunk(key.shape[1], window))
    return plan, Inputs(query, key, value, log_decay, sinks, segment_ids)


@compiled(4)
def _attend(plan, implementation, return_cache, padding_is_zero, inputs, keep, bias):
    """`causal_attention` without a given cache."""
    real, inputs = without_padding(inputs, padding_is_zero)
    query, key, value, log_decay, *_ = inputs
    lasting = lasting_tokens(keep, plan.initial, inputs.segment_ids, *key.shape[:2])
    if implementation in _DEFINITIONS:
        if bias is None:
            out = _by_definition(_DEFINITIONS[implementation], inputs, lasting, plan)
        else:
            read = functools.partial(_BIASED_DEFINITIONS[implementation], scale=plan.scale, window=plan.window)
            out = _by_biased_definition(read, inputs, lasting, bias)
    else:
        chunked = functools.partial(attention_chunked, plan, lasting, bias)
        if plan.similarity != Softmax():
            chunked = functools.partial(self_adjusted_chunked, plan, lasting)
        bound = functools.partial(bind, plan, lasting, bias)
        bound = functools.partial(bound, inputs)
        out = dispatch("softmax", implementation, inputs, chunked=chunked, bind=bound, order=order(inputs))
    if inputs.segment_ids is not None:
        out = zero_gradient_at_padding(out, real)
    if not return_cache:
        return out
    batch, time, heads, width = key.shape
    decay_heads = None if log_decay is None else query.shape[2]
    sizes = (heads, width, value.shape[3], key.dtype, decay_heads)
    if lasting is not None:
        return out, store(SelectedKVCache.empty(batch, time, *sizes), Entries(key, value, real, log_decay, lasting))
    return out, store(KVCache.empty(batch, plan.window or time, *sizes), Entries(key, value, real, log_decay))


@compiled(2)
def _extend(plan, block, cache, inputs, keep, bias):
    """(output, cache): `causal_attention` continued from a given cache, `block` tokens at a time."""
    real, (query, key, value, log_decay, sinks, segment_ids) = without_padding(inputs)
    lasting = lasting_tokens(keep, plan.initial, segment_ids, *key.shape[:2], cache.length)
    extend = lambda cache, *arrays: extend_attention(
        cache, *arrays, sinks, plan.similarity, plan.scale, plan.window, bias
    )
    return extend_in_blocks(extend, cache, (query, key, value, log_decay, lasting, real), block)


def without_padding(inputs, padding_is_zero=False):
    """(real, inputs): `real` [B, T] is False at padding; the inputs are set to 0 there, where they are not yet, and
    log_decay is cast to the accumulation dtype."""
    query, key, value, log_decay, sinks, segment_ids = inputs
    real = jnp.ones(key.shape[:2], bool)
    if segment_ids is not None:
        real = segment_ids != 0
        if not padding_is_zero:
            query, key, value = (zero_at_padding(x, real) for x in (query, key, value))
    if log_decay is not None:
        log_decay = jnp.where(real[..., None], log_decay, 0).astype(accumulation_dtype(key.dtype))
    return real, Inputs(query, key, value, log_decay, sinks, segment_ids)


def _by_definition(read, inputs, lasting, plan):
    """The output [B, T, H, V] by `read`, a definition for one head, in the accumulation dtype."""
    query, key, value, log_decay, sinks, segment_ids = inputs
    dtype, (batch, time, heads) = accumulation_dtype(key.dtype), key.shape[:3]
    group = query.shape[2] // heads
    segments = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids
    how = dict(scale=plan.scale, window=plan.window, similarity=plan.similarity)
    one_head = lambda *arguments: read(*arguments, **how)
    grouped = lambda x: H.fold_queries(x.astype(dtype), heads).reshape(batch, heads, time, group, *x.shape[3:])
    first = lambda x: H.heads_first(x.astype(dtype))
    if log_decay is None:
        log_decay = jnp.zeros(query.shape[:3], dtype)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(dtype).reshape(1, heads, group), (batch, heads, group))
    with jax.default_matmul_precision("highest"):
        out = H.over_heads(one_head, shared=(3, 6))(
            grouped(query), first(key), first(value), segments, grouped(log_decay), sinks, lasting
        )
    return H.unfold_queries(out.reshape(batch, heads, time * group, -1), group).astype(value.dtype)


def _by_biased_definition(read, inputs, lasting, bias):
    """The output [B, T, H, V] by `read`, a definition for all heads of one batch row, in the accumulation dtype."""
    query, key, value, log_decay, sinks, segment_ids = inputs
    dtype, (batch, time), heads = accumulation_dtype(key.dtype), key.shape[:2], query.shape[2]
    segments = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids
    places = token_positions(segment_ids, batch, time)
    key, value = H.repeat_heads(key, heads), H.repeat_heads(value, heads)
    if log_decay is None:
        log_decay = jnp.zeros(query.shape[:3], dtype)
    sinks = None if sinks is None else sinks.astype(dtype)
    rows = (query.astype(dtype), key.astype(dtype), value.astype(dtype), segments, places, log_decay)
    one_row = lambda *rows: read(*rows[:-1], sinks, rows[-1], bias)
    with jax.default_matmul_precision("highest"):
        out = jax.vmap(one_row, in_axes=(*[0] * 6, None if lasting is None else 0))(*rows, lasting)
    return out.astype(inputs.value.dtype)
