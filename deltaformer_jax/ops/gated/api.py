"""The two public gated ops: `gated_delta_rule` (DeltaNet, Gated DeltaNet, Kimi Delta Attention) and
`gated_linear_attention`."""

from __future__ import annotations

import jax

from deltaformer_jax.ops.gated.arguments import run_gated


def gated_delta_rule(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    beta: jax.Array | None = None,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = 64,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule: a memory S that each token decays, corrects towards k_t → v_t, and reads.

        S ← Diag(e^{g_t}) S                       decay: g_t one number per head, or one per key channel (K of them)
        S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ           delete and write: a gradient step of size β on ½‖Sᵀ k − v‖²
        o_t = scale · Sᵀ q_t                      read

    Without decay this is DeltaNet; with one decay per head, Gated DeltaNet; with one per key channel, Kimi Delta
    Attention.

    Letters: B batch rows, T tokens, H query and key heads, Hv value heads (a multiple of H; with r = Hv/H, value heads
    h·r … h·r + r − 1 share key head h), K and V the head dimensions of keys and values.

    Args:
      query, key: [B, T, H, K], value: [B, T, Hv, V]. All have one dtype: float64, float32, bfloat16 or float16. Keys of
        unit length, or any with ‖k‖² β ≤ 2, keep S bounded. Longer keys let S grow without bound. The op does not
        normalise keys.
      beta: β [B, T, Hv], floats, or one number; None means 1. For unit keys, the transition I − β k kᵀ has eigenvalues
        in [0, 1] if β is in [0, 1], and in [−1, 1] if β is in [0, 2].
      log_decay: g [B, T, Hv], [B, T, Hv, K] or one number: natural logarithms of decays, finite and at most 0. g may be
        arbitrarily negative: e^g then underflows to 0, and nothing is clipped. None means no decay.
      scale: multiplies q; None means K ** -0.5.
      initial_state: S [B, Hv, K, V], the state before the first segment of each row; None means 0.
      segment_ids: [B, T] ints. 0 is padding: the output there is 0, the token neither writes nor decays, and it may
        hold anything, NaN included. Tokens of one segment have equal ids and are contiguous. The second and every later
        segment of a row starts from S = 0.
      chunk_size: about how many tokens "chunked" solves for at once, any positive int; None means 64. The size is
        rounded up to a power of two.
      implementation: "recurrent" (the definition, a scan over tokens), "chunked" (a scan over chunks with a
        hand-written backward pass), "triton" (kernels for NVIDIA GPUs: float32, bfloat16 and float16, head dimensions
        up to 256) or "pallas_tpu" (kernels for TPUs: float32 and bfloat16, head dimensions up to 256). The kernels
        choose their own chunk size. None is the default choice: the kernels of the platform that the program is
        compiled for if they support the call, else "chunked". If T = 1 and no kernel is named, the op takes one step of
        the recurrence. A decoding step is therefore this call with the last `final_state` as `initial_state`.

    Returns:
      (o, final_state): o [B, T, Hv, V] in value's dtype; final_state [B, Hv, K, V], the state after the last segment of
      each row. The state and all sums are float32 (float64 for float64).

    Raises:
      ValueError, TypeError: a shape, dtype, name or size that does not fit (raised while tracing). Also a positive
        log_decay, and a segment id that occurs in two separate runs of a row, if their values are known. Under jit they
        are not known, and the result is then undefined.
      NotImplementedError: the named implementation does not exist for this op, does not support this call, needs
        another platform, or needs a package that is not installed. Also a second derivative of any implementation but
        "recurrent".

    Cost: "chunked" with chunks of C tokens takes, per token and value head, about C (2 K + 2 V) + 3 K V multiply-adds
      forward and two to three times as many backward, where it recomputes the forward's states. Besides arguments,
      outputs and gradients it holds O(√(T/C) K V + √(T C) (C + K + V)) numbers per head (chunked.py). The backward pass
      of "recurrent" keeps T K V numbers per head.

    Source: Schlag, Irie, Schmidhuber, arXiv 2102.11174 (the delta rule); Yang et al., arXiv 2406.06484 (its chunked
      form); Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv 2412.06464 (one decay per head); Kimi Linear, arXiv
      2510.26692 (one per channel); Grazzi et al., arXiv 2411.12537 (β up to 2).
    """
    return run_gated(
        query,
        key,
        value,
        beta=beta,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        delta=True,
    )


def gated_linear_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int | None = 64,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Gated linear attention: a memory S that each token decays, adds to, and reads.

        S ← Diag(e^{g_t}) S + k_t v_tᵀ            g_t one number per head, or one per key channel (K of them)
        o_t = scale · Sᵀ q_t                      equal to scale · Σ_{i≤t} (q_t · e^{Σ_{i<l≤t} g_l} k_i) v_i

    Without decay this is linear attention; with one fixed decay per head, RetNet's retention; with one data-dependent
    decay per head, Mamba-2; with one per key channel, GLA.

    Letters: B batch rows, T tokens, H query and key heads, Hv value heads (a multiple of H; with r = Hv/H, value heads
    h·r … h·r + r − 1 share key head h), K and V the head dimensions of keys and values. The op applies no feature map:
    the caller applies one to query and key.

    Args:
      query, key: [B, T, H, K], value: [B, T, Hv, V]. All have one dtype: float64, float32, bfloat16 or float16.
      log_decay: g [B, T, Hv], [B, T, Hv, K] or one number: natural logarithms of decays, finite and at most 0. g may be
        arbitrarily negative: e^g then underflows to 0, and nothing is clipped. None means no decay.
      scale: multiplies q; None means K ** -0.5.
      initial_state: S [B, Hv, K, V], the state before the first segment of each row; None means 0.
      segment_ids: [B, T] ints. 0 is padding: the output there is 0, the token neither writes nor decays, and it may
        hold anything, NaN included. Tokens of one segment have equal ids and are contiguous. The second and every later
        segment of a row starts from S = 0.
      chunk_size: about how many tokens "chunked" processes at once, any positive int; None means 64. The size is
        rounded up to a power of two.
      implementation: "recurrent" (the definition, a scan over tokens), "chunked" (a scan over chunks with a
        hand-written backward pass), "triton" (kernels for NVIDIA GPUs: float32, bfloat16 and float16, head dimensions
        up to 256) or "pallas_tpu" (kernels for TPUs: float32 and bfloat16, head dimensions up to 256). The kernels
        choose their own chunk size. None is the default choice: the kernels of the platform that the program is
        compiled for if they support the call, else "chunked". If T = 1 and no kernel is named, the op takes one step of
        the recurrence. A decoding step is therefore this call with the last `final_state` as `initial_state`.

    Returns:
      (o, final_state): o [B, T, Hv, V] in value's dtype; final_state [B, Hv, K, V], the state after the last segment of
      each row. The state and all sums are float32 (float64 for float64).

    Raises:
      ValueError, TypeError: a shape, dtype, name or size that does not fit (raised while tracing). Also a positive
        log_decay, and a segment id that occurs in two separate runs of a row, if their values are known. Under jit they
        are not known, and the result is then undefined.
      NotImplementedError: the named implementation does not exist for this op, does not support this call, needs
        another platform, or needs a package that is not installed. Also a second derivative of any implementation but
        "recurrent".

    Cost: "chunked" with chunks of C tokens takes, per token and value head, C (K + V) + 2 K V multiply-adds forward and
      two to three times as many backward. Besides arguments, outputs and gradients it holds
      O(√(T/C) K V + √(T C) (C + K + V)) numbers per head (chunked.py). The backward pass of "recurrent" keeps T K V
      numbers per head.

    Source: Katharopoulos et al., arXiv 2006.16236 (linear attention); Sun et al., RetNet, arXiv 2307.08621; Dao and Gu,
      Mamba-2, arXiv 2405.21060; Yang et al., Gated Linear Attention, arXiv 2312.06635.
    """
    return run_gated(
        query,
        key,
        value,
        beta=None,
        log_decay=log_decay,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        delta=False,
    )
