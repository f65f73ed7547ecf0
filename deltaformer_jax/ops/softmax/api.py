"""Softmax attention, causal, with an optional window: the family's baseline, and the read of DeltaFormer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from deltaformer_jax.ops.cache.caches import Entries, KVCache, check_cache, check_room, store
from deltaformer_jax.ops.cache.extension import extend_attention, extend_in_blocks
from deltaformer_jax.ops.common import checks
from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common.compiled import compiled
from deltaformer_jax.ops.common.dispatch import BACKENDS, check_implementation, dispatch
from deltaformer_jax.ops.common.similarity import Softmax
from deltaformer_jax.ops.common.tiles import accumulation_dtype, default_chunk
from deltaformer_jax.ops.softmax.chunked import Inputs, Plan, attention_chunked
from deltaformer_jax.ops.softmax.definition import attend_parallel, attend_recurrent
from deltaformer_jax.ops.softmax.kernels import bind

_SOFTMAX = Softmax()

_DEFINITIONS = {"recurrent": attend_recurrent, "parallel": attend_parallel}


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    log_decay: jax.Array | None = None,
    sinks: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
    cache: KVCache | None = None,
    return_cache: bool = False,
) -> jax.Array | tuple[jax.Array, KVCache]:
    """Softmax attention, each token over itself and the window − 1 before it.

        s_ti = scale · q_t·k_i + Σ_{i<l≤t} g_l,          p_ti = e^{s_ti} / (e^{b} + Σ_{t−window<j≤t} e^{s_tj})
        o_t = Σ_i p_ti v_i

    g ≤ 0 the log decay (the forgetting gate) and b the sink's logit of the head; without sinks e^b is 0.

    Letters: B rows, T tokens, H query heads, G key/value heads (H a multiple of G), widths K and V.

    Args:
      query: [B, T, H, K], key: [B, T, G, K], value: [B, T, G, V]; one float dtype.
      scale: multiplies q·k; None means K ** -0.5.
      window: how many tokens a token sees, itself included; None means all before it.
      log_decay: g [B, T, H] or one number, at most 0, the natural log of how much of the past a token leaves; None
        means 0.
      sinks: b [H], a logit each head may always attend to, of value 0; None means none.
      segment_ids: [B, T] ints, 0 for padding (returns 0, is seen by nobody, may hold anything); equal ids form one
        contiguous run, and a token sees its own run only.
      implementation: "recurrent", "parallel", "chunked"; "cudnn" (NVIDIA) or "splash" (TPU), which take bfloat16, one
        width and neither decays nor sinks. None chooses by the platform compiled for: these where they can do the call
        (cuDNN only where this process sees an NVIDIA device), else "chunked".
      cache: a KVCache to go on from; with a window a ring of `window` slots. New tokens with segment id 0 are not
        stored.
      return_cache: also return the cache after these tokens. Without `cache` a new one is made, of `window` slots or T.

    Returns:
      o [B, T, H, V] in value's dtype, or (o, cache) when there is a cache or `return_cache`. Sums are float32 inside.

    Raises:
      ValueError, TypeError: shapes, dtypes, names, sizes; a positive log decay, or a cache without room, where values
        are concrete (under jit the first is computed as it stands and the second loses tokens).
      NotImplementedError: an implementation this op does not have, or a second derivative of "chunked".

    Cost: 2 T² K B H floating-point operations (4 T · window · K B H with a window), 2.5 times that backward; memory
      O(T (K+V)) a head for "chunked".

    Source: Vaswani et al., arXiv 1706.03762; computed as in Dao et al., arXiv 2205.14135; window as in Beltagy et al.,
      arXiv 2004.05150; forgetting gate: Lin et al., arXiv 2503.02130, eq. 5; sinks: Xiao et al., arXiv 2309.17453.
    """
    checks.check_heads(query, key, value)
    check_implementation("softmax", implementation)
    checks.check_size("window", window)
    segment_ids = checks.as_segment_ids(segment_ids, key)
    scale = checks.check_scale("scale", scale, key.shape[3])
    shapes = [(*key.shape[:2], query.shape[2])]
    log_decay = checks.as_log_decay(log_decay, "query heads", shapes, segment_ids, key)
    checks.check_sinks(sinks, query.shape[2])
    if cache is not None or return_cache:
        checks.check_one_document(segment_ids)
    inputs = Inputs(query, key, value, log_decay, sinks, segment_ids)
    plan = Plan(scale, window, default_chunk(key.shape[1]))
    if cache is not None:
        decay_heads = None if log_decay is None else query.shape[2]
        check_cache(cache, KVCache, key, value.shape[2], value.shape[3], decay_heads)
        check_room(cache, segment_ids, key.shape[1], window)
        if implementation in BACKENDS["softmax"]:
            raise NotImplementedError(f"implementation={implementation!r} has no cache: use None or 'chunked'")
        block = {"recurrent": 1, "parallel": key.shape[1]}.get(implementation, 128)
        return _extend(plan, block, cache, inputs)
    return _attend(plan, implementation, return_cache, inputs)


@compiled(3)
def _attend(plan, implementation, return_cache, inputs):
    """`causal_attention` without a cache to go on from."""
    real, inputs = _without_padding(inputs)
    query, key, value, log_decay, *_ = inputs
    if implementation in _DEFINITIONS:
        out = _by_definition(_DEFINITIONS[implementation], inputs, plan.scale, plan.window)
    else:
        chunked, bound = functools.partial(attention_chunked, plan), functools.partial(bind, plan, inputs)
        out = dispatch("softmax", implementation, inputs, chunked=chunked, bind=bound)
    if inputs.segment_ids is not None:
        out = jnp.where(real[..., None, None], out, 0)
    if not return_cache:
        return out
    batch, time, heads, width = key.shape
    decay_heads = None if log_decay is None else query.shape[2]
    empty = KVCache.empty(batch, plan.window or time, heads, width, value.shape[3], key.dtype, decay_heads)
    return out, store(empty, Entries(key, value, real, log_decay))


@compiled(2)
def _extend(plan, block, cache, inputs):
    """(output, cache): `causal_attention` going on from a cache, `block` tokens at a time."""
    real, (query, key, value, log_decay, sinks, _) = _without_padding(inputs)

    def extend(cache, query, key, value, log_decay, real):
        return extend_attention(cache, query, key, value, log_decay, sinks, real, _SOFTMAX, plan.scale, plan.window)

    return extend_in_blocks(extend, cache, (query, key, value, log_decay, real), block)


def _without_padding(inputs):
    """`real` [B, T], and the inputs with padding set to 0 and log decays in the accumulation dtype."""
    query, key, value, log_decay, sinks, segment_ids = inputs
    real = jnp.ones(key.shape[:2], bool)
    if segment_ids is not None:
        real = segment_ids != 0
        query, key, value = (jnp.where(real[..., None, None], x, 0) for x in (query, key, value))
    if log_decay is not None:
        log_decay = jnp.where(real[..., None], log_decay, 0).astype(accumulation_dtype(key.dtype))
    return real, Inputs(query, key, value, log_decay, sinks, segment_ids)


def _by_definition(read, inputs, scale, window):
    query, key, value, log_decay, sinks, segment_ids = inputs
    dtype, (batch, time, heads) = accumulation_dtype(key.dtype), key.shape[:3]
    group = query.shape[2] // heads
    segments = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids
    one_head = lambda *arguments: read(*arguments, scale=scale, window=window)
    grouped = lambda x: H.fold_queries(x.astype(dtype), heads).reshape(batch, heads, time, group, *x.shape[3:])
    first = lambda x: H.heads_first(x.astype(dtype))
    if log_decay is None:
        log_decay = jnp.zeros(query.shape[:3], dtype)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(dtype).reshape(1, heads, group), (batch, heads, group))
    with jax.default_matmul_precision("highest"):
        out = H.over_heads(one_head, shared=(3,))(
            grouped(query), first(key), first(value), segments, grouped(log_decay), sinks
        )
    return H.unfold_queries(out.reshape(batch, heads, time * group, -1), group).astype(value.dtype)
