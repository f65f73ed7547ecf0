"""The gated ops' two doors: the gated delta rule (DeltaNet, Gated DeltaNet and Kimi Delta Attention), and gated linear
attention."""

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
    """A memory that is decayed, corrected towards k_t → v_t, and read.

        S ← Diag(e^{g_t}) S                       decay: g_t one number a head, or one for each of the K key channels
        S ← S + β_t k_t (v_t − Sᵀ k_t)ᵀ           delete and write: a step of size β on ½‖Sᵀ k − v‖²
        o_t = scale · Sᵀ q_t                      read

    Without decay this is DeltaNet, with one decay a head Gated DeltaNet, with one a channel Kimi Delta Attention.

    Letters: B rows, T tokens, H heads of queries and keys, Hv of values (a multiple of H; value heads h·r … h·r + r − 1
    share key head h, r = Hv/H), K and V the widths of keys and values.

    Args:
      query, key: [B, T, H, K], value: [B, T, Hv, V]; one dtype of float64, float32, bfloat16, float16. Keys of unit
        length (or ‖k‖² β ≤ 2) keep S bounded; longer ones make it grow without bound, and nothing here normalises them.
      beta: β [B, T, Hv], floats, or one number; None means 1. In [0, 1] the transition I − β k kᵀ has eigenvalues in
        [0, 1], up to 2 in [−1, 1].
      log_decay: g [B, T, Hv], [B, T, Hv, K] or one number, natural logarithms of decays, at most 0 and finite, as
        strong as you like: e^g underflows to 0 and nothing is clipped. None means no decay.
      scale: multiplies q; None means K ** -0.5.
      initial_state: S [B, Hv, K, V] that a row's first segment starts from; None means 0.
      segment_ids: [B, T] ints. 0 is padding: such rows return 0, write nothing and decay nothing, whatever they hold.
        Equal ids form one contiguous run, and the state is emptied where a row's second and later runs start.
      chunk_size: about how many tokens "chunked" solves for at once, any positive int; None means 64. Rounded up to a
        power of two.
      implementation: "recurrent" (the definition, a scan over tokens), "chunked" (a scan over chunks with a backward of
        its own), "triton" (kernels for NVIDIA GPUs: float32 and two-byte floats, widths up to 256), "pallas_tpu"
        (kernels for TPUs: float32 and bfloat16, widths up to 256); kernels have chunks of their own. None chooses the
        fastest for the platform being compiled for: the kernels where they can do the call, else "chunked". One token,
        T = 1, is a step of the recurrence unless a kernel is named: decoding is this call with the last `final_state`.

    Returns:
      (o [B, T, Hv, V] in value's dtype, final_state [B, Hv, K, V], the state of each row's last segment).
      The state and all sums are float32 (float64 for float64).

    Raises:
      ValueError, TypeError: shapes, dtypes, names and sizes, while tracing; positive decays and ids that come back
        within a row when their values are known (under jit those two are undefined).
      NotImplementedError: an implementation this op does not have, for this platform or this call or without a
        package that is not installed; a second derivative of any but "recurrent".

    Cost: for "chunked", multiply-adds a token and value head, about C (2 K + 2 V) + 3 K V forward with chunks of C, and
      two to three times that backward, which makes the forward's states again; beside arguments, output and gradients
      O(√(T/C) K V + √(T C) (C + K + V)) numbers a head (chunked.py). The backward of "recurrent" keeps T K V.

    Source: Schlag, Irie, Schmidhuber, arXiv 2102.11174 (the delta rule); Yang et al., arXiv 2406.06484 (in chunks);
      Yang, Kautz, Hatamizadeh, Gated Delta Networks, arXiv 2412.06464 (one decay a head); Kimi Linear, arXiv 2510.26692
      (one a channel); Grazzi et al., arXiv 2411.12537 (β up to 2).
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
    """A memory that is decayed, written and read.

        S ← Diag(e^{g_t}) S + k_t v_tᵀ            g_t one number a head, or one for each of the K key channels
        o_t = scale · Sᵀ q_t                      the same as Σ_{i≤t} (q_t · e^{Σ_{i<l≤t} g_l} k_i) v_i

    Without decay this is linear attention, with one fixed for each head RetNet's retention, with one a head that
    depends on the data Mamba-2's, with one a channel GLA's.

    Letters: B rows, T tokens, H heads of queries and keys, Hv of values (a multiple of H; value heads h·r … h·r + r − 1
    share key head h, r = Hv/H), K and V the widths of keys and values. Feature maps are the caller's.

    Args:
      query, key: [B, T, H, K], value: [B, T, Hv, V]; one dtype of float64, float32, bfloat16, float16.
      log_decay: g [B, T, Hv], [B, T, Hv, K] or one number, natural logarithms of decays, at most 0 and finite, as
        strong as you like: e^g underflows to 0 and nothing is clipped. None means no decay.
      scale: multiplies q; None means K ** -0.5.
      initial_state: S [B, Hv, K, V] that a row's first segment starts from; None means 0.
      segment_ids: [B, T] ints. 0 is padding: such rows return 0, write nothing and decay nothing, whatever they hold.
        Equal ids form one contiguous run, and the state is emptied where a row's second and later runs start.
      chunk_size: about how many tokens "chunked" takes at once, any positive int; None means 64. Rounded up to a power
        of two.
      implementation: "recurrent" (the definition, a scan over tokens), "chunked" (a scan over chunks with a backward of
        its own), "triton" (kernels for NVIDIA GPUs: float32 and two-byte floats, widths up to 256), "pallas_tpu"
        (kernels for TPUs: float32 and bfloat16, widths up to 256); kernels have chunks of their own. None chooses the
        fastest for the platform being compiled for: the kernels where they can do the call, else "chunked". One token,
        T = 1, is a step of the recurrence unless a kernel is named: decoding is this call with the last `final_state`.

    Returns:
      (o [B, T, Hv, V] in value's dtype, final_state [B, Hv, K, V], the state of each row's last segment).
      The state and all sums are float32 (float64 for float64).

    Raises:
      ValueError, TypeError: shapes, dtypes, names and sizes, while tracing; positive decays and ids that come back
        within a row when their values are known (under jit those two are undefined).
      NotImplementedError: an implementation this op does not have, for this platform or this call or without a
        package that is not installed; a second derivative of any but "recurrent".

    Cost: for "chunked", multiply-adds a token and value head, C (K + V) + 2 K V forward with chunks of C, and two to
      three times that backward; beside arguments, output and gradients O(√(T/C) K V + √(T C) (C + K + V)) numbers a
      head (chunked.py). The backward of "recurrent" keeps T K V.

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
