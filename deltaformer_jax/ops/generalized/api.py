"""The public op `generalized_delta_rule` (Gated DeltaNet-2, RWKV-7)."""

from __future__ import annotations

import jax
from jax import lax

from deltaformer_jax.ops.common import checks
from deltaformer_jax.ops.common.compiled import compiled
from deltaformer_jax.ops.common.dispatch import check_implementation
from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.ops.gated.arguments import FORMS, check_gated_heads, check_state, flags_of
from deltaformer_jax.ops.gated.chunked import chunk_rows
from deltaformer_jax.ops.generalized.chunked import Inputs, Plan, generalized_chunked
from deltaformer_jax.ops.generalized.definition import recurrent


def generalized_delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    erase_key: jax.Array,
    erase_write: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = 64,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The generalized delta rule: a memory S whose erasing has vectors of its own, apart from those of its writing.

        S ← (Diag(e^{g_t}) − a_t b_tᵀ) S + k_t v_tᵀ      decay, erase and write: the erase key b reads the state before
                                                         the decay, and what it read is taken off along a
        o_t = scale · Sᵀ q_t                             read

    The rules that it contains:

        a = k,        b = e^g ⊙ β k,      value = β v         the gated delta rule (Kimi Delta Attention)
        a = k,        b = e^g ⊙ β ⊙ k,    value = w ⊙ v       Gated DeltaNet-2, with gates β and w per channel
        a = η ⊙ κ,    b = κ of unit length                    RWKV-7, with its learning rate η per channel
        a = 0 or b = 0                                        gated linear attention

    `gated_delta_rule` and `gated_linear_attention` compute the first and the last with fewer products and with kernels.

    Letters: B batch rows, T tokens, H query and key heads, Hv value heads (a multiple of H; with r = Hv/H, value heads
    h·r … h·r + r − 1 share key head h), K and V the head dimensions of keys and values.

    Args:
      query, key: [B, T, H, K], value: [B, T, Hv, V]. All have one dtype: float64, float32, bfloat16 or float16.
      erase_key, erase_write: b and a [B, T, Hv, K], or [B, T, H, K] shared as the keys are. Floats. S stays bounded if
        no Diag(e^g) − a bᵀ lengthens a vector; the op does not check that.
      log_decay: g [B, T, Hv], [B, T, Hv, K] or one number: natural logarithms of decays, finite and at most 0. g may be
        arbitrarily negative: e^g then underflows to 0, and nothing is clipped. A decay per head costs as much as one
        per key channel. None means no decay.
      scale: multiplies q; None means K ** -0.5.
      initial_state: S [B, Hv, K, V], the state before the first segment of each row; None means 0.
      segment_ids: [B, T] ints. 0 is padding: the output there is 0, the token neither writes nor erases nor decays, and
        it may hold anything, NaN included. Tokens of one segment have equal ids and are contiguous. The second and
        every later segment of a row starts from S = 0.
      chunk_size: about how many tokens "chunked" solves for at once, any positive int; None means 64. The size is
        rounded up to a power of two.
      implementation: "recurrent" (the definition, a scan over tokens), "chunked" (a scan over chunks), or None:
        "chunked", and one step of the recurrence if T = 1. A decoding step is therefore this call with the last
        `final_state` as `initial_state`. There are no kernels.

    Returns:
      (o, final_state): o [B, T, Hv, V] in value's dtype; final_state [B, Hv, K, V], the state after the last segment of
      each row. The state and all sums are float32 (float64 for float64). Both forms can be differentiated any number of
      times, forwards and backwards.

    Raises:
      ValueError, TypeError: a shape, dtype, name or size that does not fit (raised while tracing). Also a log_decay
        that is positive or not finite, and a segment id that occurs in two separate runs of a row, if their values are
        known. Under jit they are not known, and the result is then undefined.
      NotImplementedError: the named implementation is that of kernels, which this op does not have.

    Cost: "chunked" with chunks of C tokens takes, per token and value head, about C (4 K + 4 V) + 4 K V multiply-adds
      forward and three times as many backward, which computes the forward pass again. What it keeps in memory is
      O(√(T/C) K V + √(T C) (C + K log C + V)) numbers per head besides copies of the arguments (chunked.py). The
      backward pass of "recurrent" keeps T K V numbers per head.

    Source: Hatamizadeh, Choi, Kautz, Gated DeltaNet-2, arXiv 2605.22791; Peng et al., RWKV-7, arXiv 2503.14456, which
      calls the rule with a and b of its own "generalized". The chunked form is derived here from those of Yang et al.,
      arXiv 2406.06484 and arXiv 2312.06635.
    """
    check_gated_heads(query, key, value)
    check_implementation("generalized", implementation, FORMS)
    checks.check_size("chunk_size", chunk_size)
    scale = checks.check_scale("scale", scale, key.shape[3])
    segment_ids = checks.as_segment_ids(segment_ids, key)
    batch, time, heads, width = *value.shape[:3], key.shape[3]
    _check_erase("erase_key", erase_key, key, heads)
    _check_erase("erase_write", erase_write, key, heads)
    shapes = [(batch, time, heads), (batch, time, heads, width)]
    log_decay = checks.as_log_decay(log_decay, "value heads", shapes, segment_ids, value)
    check_state(initial_state, (batch, heads, width, value.shape[3]))
    plan = Plan(scale, chunk_rows(64 if chunk_size is None else chunk_size, time))
    arrays = (query, key, value, erase_key, erase_write, log_decay, initial_state)
    return _run(plan, implementation, arrays, segment_ids)


@compiled(2)
def _run(plan, implementation, arrays, segment_ids):
    *arrays, log_decay, state = arrays
    key, value = arrays[1:3]
    if state is None:
        # full_like instead of zeros: inside shard_map the state must vary over the same mesh axes as value.
        shape = (value.shape[0], value.shape[2], key.shape[3], value.shape[3])
        state = lax.full_like(value, 0, accumulation_dtype(value.dtype), shape)
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = lax.broadcast_in_dim(log_decay, (*log_decay.shape, key.shape[3]), (0, 1, 2))
    inputs = Inputs(*arrays, log_decay, state, *flags_of(segment_ids))
    if implementation == "recurrent" or value.shape[1] == 1:
        # A chunk of one token would be one step of the recurrence, so the step is taken directly.
        return recurrent(*inputs, scale=plan.scale)
    return generalized_chunked(plan, inputs)


def _check_erase(name, x, key, value_heads):
    """Raise if x is not a float array [B, T, H or Hv, K]."""
    checks.check_tokens(name, x)
    shapes = [(*key.shape[:2], heads, key.shape[3]) for heads in dict.fromkeys((value_heads, key.shape[2]))]
    if tuple(x.shape) not in shapes:
        shared = f" or, shared like the keys, {shapes[1]}" if len(shapes) > 1 else ""
        raise ValueError(
            f"{name} must have shape [batch, time, value heads, key width] = {shapes[0]}{shared}; it has "
            f"{tuple(x.shape)}"
        )
