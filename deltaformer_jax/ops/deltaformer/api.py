"""The public DeltaFormer ops: `delta_attention`, and `delta_values` for its written values alone.

DeltaFormer is attention over written values u. Before a token's value is stored, the delta rule subtracts from it what
the memory already returns for that token's write query.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from deltaformer_jax.ops.cache.caches import (
    Entries,
    KUCache,
    Selected,
    SelectedKUCache,
    check_cache,
    check_room,
    check_selected,
    lasting_tokens,
    store,
    token_positions,
)
from deltaformer_jax.ops.cache.extension import extend_delta, extend_in_blocks
from deltaformer_jax.ops.common import checks
from deltaformer_jax.ops.common import heads as H
from deltaformer_jax.ops.common.compiled import compiled
from deltaformer_jax.ops.common.dispatch import BACKENDS, check_implementation, dispatch
from deltaformer_jax.ops.common.padding import zero_at_padding, zero_gradient_at_padding
from deltaformer_jax.ops.common.similarity import (
    SelfAdjust,
    Similarity,
    Softmax,
    as_similarity,
    as_write_similarity,
    without_arrays,
)
from deltaformer_jax.ops.common.tiles import accumulation_dtype, default_chunk
from deltaformer_jax.ops.deltaformer.chunked import Inputs, Plan, delta_chunked, whole_plan
from deltaformer_jax.ops.deltaformer.definition import (
    read_biased_parallel,
    read_biased_recurrent,
    read_parallel,
    read_recurrent,
    write_biased_parallel,
    write_biased_recurrent,
    write_parallel,
    write_recurrent,
)
from deltaformer_jax.ops.deltaformer.kernels import bind
from deltaformer_jax.ops.position_bias import BIASED_CHUNK, Biases, PositionBias, as_position_bias

_DEFINITIONS = {"recurrent": (write_recurrent, read_recurrent), "parallel": (write_parallel, read_parallel)}
_BIASED = {
    "recurrent": (write_biased_recurrent, read_biased_recurrent),
    "parallel": (write_biased_parallel, read_biased_parallel),
}


def delta_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    write_query: str | jax.Array = "key",
    alpha: jax.Array | None = None,
    beta: jax.Array | None = None,
    write_similarity: str | Similarity = "softmax",
    read_similarity: str | Similarity = "softmax",
    write_scale: float | None = None,
    read_scale: float | None = None,
    write_bias: PositionBias | None = None,
    read_bias: PositionBias | None = None,
    window: int | None = None,
    keep: jax.Array | None = None,
    initial: int = 0,
    segment_ids: jax.Array | None = None,
    padding_is_zero: bool = False,
    chunk_size: int | None = None,
    implementation: str | None = None,
    cache: KUCache | None = None,
    return_cache: bool = False,
) -> jax.Array | tuple[jax.Array, KUCache]:
    """DeltaFormer attention.

        u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i          write: strictly causal
        o_t = Σ_{i≤t} κ₂(q_t, k_i) u_i                          read: causal, the token itself included

    With biases by position, κ₁ is applied to write_scale · w_t·k_i + b₁(t, i), κ₂ to read_scale · q_t·k_i + b₂(t, i).

    β = 0, α = 1, κ₂ = softmax is ordinary attention; κ₁ = κ₂ = linear, w = k, α = β is DeltaNet.

    With a `window`, both sums run over the visible tokens only: i is visible to t ≥ i if

        t − i < window   or   keep_i   or   (position of i in its segment) < initial

    A token that has become invisible is never needed again, so its entry can leave the cache (`compact_cache`) and the
    outputs stay those of this formula. What it had deleted from the u of others remains deleted.

    Letters: B batch rows, T tokens, H query heads, G key/value heads (H a multiple of G), K and V the head dimensions
    of keys and values. Hu is the number of heads of the write query: G or H. u, α and β have Hu heads. With w = k the
    query heads of a group therefore share u.

    Args:
      query: [B, T, H, K], key: [B, T, G, K], value: [B, T, G, V]. All have one dtype: float64, float32, bfloat16 or
        float16.
      write_query: w. "key" (the delta rule proper, Hu = G), "query" (Hu = H), or an array [B, T, Hu, K].
      alpha, beta: [B, T, Hu], floats, or one number; None means 1. With softmax, 0 ≤ β ≤ 1 keeps u bounded. With
        |β| > 1, u can grow geometrically.
      write_similarity, read_similarity: κ₁, κ₂: "linear", "relu", "exp", "softmax", "round"; or an object of
        `deltaformer_jax.ops.common.similarity`, for example Round(decimals=0); or a function or object of your own
        (`as_similarity` there). κ₂ may also be "self_adjust" or "self_adjust_basic" (`SelfAdjust` there), which no
        kernels have.
      write_scale, read_scale: multiply w·k and q·k; None means K ** -0.5. For keys of unit length use a write scale
        of 1.
      write_bias, read_bias: b₁ and b₂, functions of the positions of both tokens or, as in `ops.Dape`, of the scores of
        all heads too: `ops.Alibi`, `ops.Kerple`, `ops.Fire`, `ops.Dape`, or one of your own, see
        `ops.position_bias.PositionBias`. The arrays of b₁ are [Hu, …], those of b₂ [H, …], or [1, …] if all heads share
        them. None means 0. With either, write and read are two passes.
      window: how many tokens a token sees, itself included; None means all tokens up to and including itself.
      keep: [B, T] bool, True for tokens that all later ones of the segment see, for example separators. It needs a
        window, or a cache of chosen tokens, which remembers them for `streaming_entries`.
      initial: how many tokens at the start of each segment all later ones see. It needs the same.
      segment_ids: [B, T] ints. 0 is padding: the output there is 0, no token sees it, and it may hold anything, NaN
        included. Tokens of one segment have equal ids and are contiguous. A token sees only its own segment.
      padding_is_zero: promises that query, write_query, key and value are 0 at padding, as they are in the mixers. They
        are then not set to 0 again, which saves a pass over each. With a given cache it changes nothing.
      chunk_size: rows of a chunk, any positive int; None chooses. "chunked" uses it, and so does a call with a cache.
      implementation: "recurrent" (the definition, token by token), "parallel" (T×T matrices), "chunked" (a scan over
        chunks with a hand-written backward pass), "triton" (kernels for NVIDIA GPUs: float32, bfloat16 and float16,
        head dimensions up to 256) or "pallas_tpu" (kernels for TPUs: float32 and bfloat16, head dimensions up to 256).
        The kernels choose their own chunk size. They have no write_bias, read_bias, window, keep or initial. They can
        return a new cache, but they cannot continue from a given one. None is the default choice: the kernels of the
        platform that the program is compiled for if they support the call, else "chunked".
      cache: a KUCache to continue from. Each of its rows holds one document, and the new tokens follow that document.
        New tokens with segment id 0 are not stored. The same call does prefill (T > 1) and a decoding step (T = 1).
        With a window it may be a ring of `window` slots. With keep or initial it must be a SelectedKUCache, whose
        entries `compact_cache` drops.
      return_cache: also return the cache after these tokens. Without `cache`, this is a new cache of capacity T; with
        keep or initial it is a SelectedKUCache.

    Returns:
      o [B, T, H, V] in value's dtype; (o, cache) if `cache` is given or `return_cache` is true.
      Sums and u are float32 (float64 for float64) inside the op. A cache holds u in the cache's own dtype.

    Raises:
      ValueError, TypeError: a shape, dtype, name or size that does not fit (raised while tracing). Also a segment id
        that occurs in two separate runs of a row, and a cache without room, if their values are known. Under jit they
        are not known, and the result is then undefined.
      NotImplementedError: the named implementation does not exist for this op, does not support this call, needs
        another platform, or needs a package that is not installed. Also a second derivative of any implementation but
        "recurrent" and "parallel".

    Cost: with F = 2 T² K B H floating-point operations (one causal pass of two matrix products): (1 + G/H) F for w = k;
      1 F if one pass serves write and read (w = q, both similarities softmax, equal scales, no bias, neither keep nor
      initial: the op detects this itself); else 2 F. The backward pass costs 2.5 times as much. With a window F is
      4 T (window + S) K B H, where S tokens last behind it; beside a self-adjusted read or a bias that of T² again.
      Memory: O(T (K+V)) per head for "chunked", O(T²) for "parallel".

    Source: Xu et al., "DeltaFormer: unlock the state space of Transformer", NeurIPS 2025, eq. 8 and 9. Grouped queries,
      caches, segments, the one-pass form and the backward pass are this project's.
    """
    gates = (alpha, beta, segment_ids)
    similarities = (write_similarity, read_similarity, write_scale, read_scale)
    plan, own_query, held, inputs = checked(
        query, key, value, write_query, *gates, *similarities, chunk_size, implementation
    )
    checks.check_selection(keep, initial, window, key, isinstance(cache, Selected))
    plan = dataclasses.replace(plan, window=window, initial=int(initial))
    if window is not None and chunk_size is None:
        plan = dataclasses.replace(plan, chunk=default_chunk(key.shape[1], window))
    if read_bias is not None:
        if isinstance(plan.read_similarity, SelfAdjust):
            raise ValueError(f"read_similarity={read_similarity!r}: has no read_bias; leave it out, or take 'softmax'")
        read_bias = as_position_bias(read_bias, query.shape[2], key, "read_bias")
    write_heads = query.shape[2] if own_query else _write_heads(inputs.write_query, key)
    biases = Biases(_as_write_bias(write_bias, write_heads, key), read_bias)
    plan = _with_chunk_of(biases, plan, chunk_size)
    if cache is not None or return_cache:
        checks.check_one_document(inputs.segment_ids)
    if cache is not None:
        cache = check_cache(cache, KUCache, key, write_heads, value.shape[3])
        check_selected(cache, keep, initial)
        check_room(cache, inputs.segment_ids, key.shape[1], window)
        if implementation in BACKENDS["delta"]:
            raise NotImplementedError(
                f"implementation={implementation!r} cannot continue from a cache: use None or 'chunked'"
            )
        block = {"recurrent": 1, "parallel": key.shape[1]}.get(implementation, chunk_size or 128)
        return _extend(plan, own_query, block, held, cache, inputs, keep, biases)
    return _attend(plan, own_query, implementation, return_cache, padding_is_zero, held, inputs, keep, biases)


def delta_values(
    key: jax.Array,
    value: jax.Array,
    *,
    write_query: str | jax.Array = "key",
    alpha: jax.Array | None = None,
    beta: jax.Array | None = None,
    write_similarity: str | Similarity = "softmax",
    write_scale: float | None = None,
    write_bias: PositionBias | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The written values of DeltaFormer, without the read.

        u_t = α_t v_t − β_t Σ_{i<t} κ₁(w_t, k_i) u_i,      in matrices U = (I + diag(β) A)⁻¹ diag(α) V

    Arguments, errors and source are those of `delta_attention`. `write_query` is "key" or an array [B, T, Hu, K], with
    Hu any multiple of G.

    Returns:
      u [B, T, Hu, V] in value's dtype, 0 at padding.

    Cost: one causal pass of two matrix products for each of the Hu heads.
    """
    given = (write_query, alpha, beta, segment_ids)
    write_query, alpha, beta, segment_ids = _checked(None, key, value, *given, chunk_size, implementation)
    write_similarity, write_arrays = without_arrays(as_write_similarity(write_similarity, "write_similarity"))
    plan = Plan(
        write_similarity,
        checks.check_scale("write_scale", write_scale, key.shape[3]),
        None,
        None,
        tied=False,
        chunk=_chunk(chunk_size, key),
    )
    inputs = Inputs(None, write_query, key, value, alpha, beta, segment_ids)
    biases = Biases(_as_write_bias(write_bias, _write_heads(write_query, key), key))
    return _write(_with_chunk_of(biases, plan, chunk_size), implementation, (write_arrays, ()), inputs, biases)


def checked(
    query,
    key,
    value,
    write_query,
    alpha,
    beta,
    segment_ids,
    write_similarity,
    read_similarity,
    write_scale,
    read_scale,
    chunk_size,
    implementation,
) -> tuple[Plan, bool, tuple[tuple, tuple], Inputs]:
    """The arguments of `delta_attention` as (plan, whether the write query is the query itself, the arrays that the
    similarities hold, inputs). The inputs' write query is then None, and also if it is the key. Raises for an argument
    that does not fit."""
    given = (write_query, alpha, beta, segment_ids)
    write_query, alpha, beta, segment_ids = _checked(query, key, value, *given, chunk_size, implementation)
    write_similarity, write_arrays = without_arrays(as_write_similarity(write_similarity, "write_similarity"))
    read_similarity, read_arrays = without_arrays(as_similarity(read_similarity, "read_similarity"))
    plan = Plan(
        write_similarity,
        checks.check_scale("write_scale", write_scale, key.shape[3]),
        read_similarity,
        checks.check_scale("read_scale", read_scale, key.shape[3]),
        tied=False,
        chunk=_chunk(chunk_size, key),
    )
    own_query = write_query is query
    inputs = Inputs(query, None if own_query else write_query, key, value, alpha, beta, segment_ids)
    return plan, own_query, (write_arrays, read_arrays), inputs


@compiled(5)
def _attend(plan, own_query, implementation, return_cache, padding_is_zero, held, inputs, keep, biases):
    """`delta_attention` without a given cache. `own_query` says that the write query is the query itself."""
    real, inputs = without_padding(inputs, padding_is_zero)
    query, write_query, key, value, *_ = inputs
    if own_query:
        plain = not biases.given and keep is None and not plan.initial
        softmax = plan.write_similarity == plan.read_similarity == Softmax() and plan.write_scale == plan.read_scale
        tied = plain and softmax and implementation not in _DEFINITIONS
        plan, write_query = dataclasses.replace(plan, tied=tied), None if tied else query
    lasting = lasting_tokens(keep, plan.initial, inputs.segment_ids, *key.shape[:2])
    out, u = _compute(implementation, plan, held, lasting, biases, inputs._replace(write_query=write_query))
    if inputs.segment_ids is not None:
        out = zero_gradient_at_padding(out, real)
    if not return_cache:
        return out
    kind = KUCache if lasting is None else SelectedKUCache
    empty = kind.empty(*key.shape[:3], u.shape[2], key.shape[3], value.shape[3], key.dtype)
    return out, store(empty, Entries(key, u, real, lasting=lasting))


@compiled(3)
def _extend(plan, own_query, block, held, cache, inputs, keep, biases):
    """(output, cache): `delta_attention` continued from a given cache, `block` tokens at a time."""
    plan = whole_plan(plan, held)
    real, (query, write_query, key, value, alpha, beta, segment_ids) = without_padding(inputs)
    lasting = lasting_tokens(keep, plan.initial, segment_ids, *key.shape[:2], cache.length)
    w = query if own_query else key if write_query is None else write_query
    extend = lambda cache, *arrays: extend_delta(cache, *arrays, plan, biases)
    return extend_in_blocks(extend, cache, (query, w, key, value, alpha, beta, lasting, real), block)


@compiled(2)
def _write(plan, implementation, held, inputs, biases):
    """The body of `delta_values`: u [B, T, Hu, V]."""
    real, inputs = without_padding(inputs)
    _, u = _compute(implementation, plan, held, None, biases, inputs)
    return u if inputs.segment_ids is None else zero_gradient_at_padding(u, real)


def _compute(implementation, plan, held, lasting, biases, inputs):
    """(output or None, u) by the named implementation, or by the default choice if `implementation` is None."""
    if implementation in _DEFINITIONS:
        return _by_definition(implementation, whole_plan(plan, held), lasting, biases, inputs)
    chunked = functools.partial(delta_chunked, plan, held, lasting, biases)
    kernels = functools.partial(bind, plan, biases, inputs)
    return dispatch("delta", implementation, inputs, chunked=chunked, bind=kernels)


def _resolve_write_query(write_query, query, key):
    """The write query as None (it is the key), as `query` itself, or as a checked array."""
    if isinstance(write_query, str):
        if write_query == "key":
            return None
        if write_query == "query" and query is not None:
            return query
        options = '"key", "query"' if query is not None else '"key"'
        raise ValueError(f"write_query={write_query!r}: give {options} or an array [batch, time, heads, width]")
    if write_query is key:
        return None
    checks.check_write_query(write_query, query, key)
    return write_query


def _checked(query, key, value, write_query, alpha, beta, segment_ids, chunk_size, implementation):
    """(write query, alpha, beta, segment ids) as checked arrays; the write query is None if it is the key. Raises for
    an argument that does not fit. `query` is None for `delta_values`."""
    checks.check_heads(query, key, value)
    check_implementation("delta", implementation)
    checks.check_size("chunk_size", chunk_size)
    write_query = _resolve_write_query(write_query, query, key)
    shapes = [(*key.shape[:2], _write_heads(write_query, key))]
    gates = (
        checks.as_gate(name, gate, "heads of the write query", shapes, key)
        for name, gate in (("alpha", alpha), ("beta", beta))
    )
    return write_query, *gates, checks.as_segment_ids(segment_ids, key)


def _write_heads(write_query, key):
    return (key if write_query is None else write_query).shape[2]


def _as_write_bias(bias, write_heads, key):
    """`bias` as a checked PositionBias of the write's heads, or None."""
    if bias is None:
        return None
    return as_position_bias(bias, write_heads, key, "write_bias", "heads of the write query")


def _with_chunk_of(biases, plan, chunk_size):
    """`plan`, with smaller chunks if there is a bias and the caller leaves their size to the op."""
    if chunk_size or not biases.given:
        return plan
    return dataclasses.replace(plan, chunk=min(plan.chunk, BIASED_CHUNK))


def _chunk(chunk_size, key):
    return min(chunk_size or default_chunk(key.shape[1]), key.shape[1])


def without_padding(inputs, padding_is_zero=False):
    """(real, inputs): `real` [B, T] is False at padding, and the inputs are set to 0 there, where they are not yet. A
    NaN in the padding then reaches neither values nor gradients."""
    *arrays, alpha, beta, segment_ids = inputs
    if segment_ids is None:
        return jnp.ones(inputs.key.shape[:2], bool), inputs
    real = segment_ids != 0
    if not padding_is_zero:
        arrays = [zero_at_padding(x, real) for x in arrays]
    return real, Inputs(*arrays, zero_at_padding(alpha, real), zero_at_padding(beta, real), segment_ids)


def _by_definition(name, plan, lasting, biases, inputs):
    """(output or None, u) by the recurrent or the parallel form, computed in the accumulation dtype."""
    query, write_query, key, value, alpha, beta, segment_ids = inputs
    write, read = _DEFINITIONS[name]
    dtype, out_dtype = accumulation_dtype(key.dtype), value.dtype
    batch, time = key.shape[:2]
    w = key if write_query is None else write_query
    heads = w.shape[2]
    ones = jnp.ones((batch, time, heads), dtype)
    first = lambda x: H.heads_first(x.astype(dtype))
    segments = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids
    k, v = first(H.repeat_heads(key, heads)), first(H.repeat_heads(value, heads))
    gates = [first(ones if gate is None else gate) for gate in (alpha, beta)]

    def biased(form, rows, bias, how):
        """A form of all heads: `rows` are [B, T, heads, ·], its result too."""
        one_row = lambda *rows: form(*rows, bias, **how)
        axes = (*[0] * (len(rows) + 2), None if lasting is None else 0)
        return jax.vmap(one_row, axes)(*rows, segments, token_positions(segment_ids, batch, time), lasting)

    with jax.default_matmul_precision("highest"):
        how = dict(similarity=plan.write_similarity, scale=plan.write_scale, window=plan.window)
        if biases.write is None:
            u = H.over_heads(functools.partial(write, **how), shared=(5, 6))(first(w), k, v, *gates, segments, lasting)
        else:
            rows = [H.heads_last(x) for x in (first(w), k, v, *gates)]
            u = H.heads_first(biased(_BIASED[name][0], rows, biases.write, how))
        if plan.read_similarity is None:
            return None, H.heads_last(u).astype(out_dtype)
        how = dict(similarity=plan.read_similarity, scale=plan.read_scale, window=plan.window)
        if biases.read is not None:
            repeated = (H.repeat_heads(x.astype(dtype), query.shape[2]) for x in (key, H.heads_last(u)))
            out = biased(_BIASED[name][1], (query.astype(dtype), *repeated), biases.read, how)
            return out.astype(out_dtype), H.heads_last(u).astype(out_dtype)
        group = query.shape[2] // heads
        q = H.fold_queries(query.astype(dtype), heads).reshape(batch, heads, time, group, -1)
        out = H.over_heads(functools.partial(read, **how), shared=(3, 4))(q, k, u, segments, lasting)
    out = H.unfold_queries(out.reshape(batch, heads, time * group, -1), group)
    return out.astype(out_dtype), H.heads_last(u).astype(out_dtype)
