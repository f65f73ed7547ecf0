"""JAX's splash attention, a flash attention for TPUs, as a fast Transformer baseline.

It takes bfloat16 and sums in float32. It returns only the output and no log-sum-exps, so that log_decay and sinks
cannot be added from outside.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.transform import MADE

# The numbers of rows and of columns of splash attention's tiles are multiples of LANES.
LANES = 128


def lacks(query, key, value, log_decay, sinks) -> str | None:
    """Why splash attention does not support this call, or None if it does."""
    if query.dtype != jnp.bfloat16:
        return f"splash attention multiplies in bfloat16: cast the inputs, which are {query.dtype}"
    if key.shape[3] != value.shape[3]:
        return (
            "splash attention needs keys and values of the same head dimension; they have "
            f"{key.shape[3]} and {value.shape[3]}"
        )
    if jax.config.jax_enable_x64 and query.shape[2] != key.shape[2]:
        return "splash attention divides a 32-bit by a 64-bit number for grouped queries under jax_enable_x64"
    return None if log_decay is None and sinks is None else "it supports neither log_decay nor sinks"


def attend(query, key, value, segment_ids, *, scale, window, interpret=False):
    """Causal attention: query [B,T,H,K], key and value [B,T,G,K], segment_ids [B,T] or None -> [B,T,H,K].

    Inside, T is padded to a multiple of 128.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    time, heads = key.shape[1], query.shape[2]
    length = -(-time // LANES) * LANES
    side = next(size for size in (512, 256, LANES) if length % size == 0)
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    blocks = {
        name: side
        for name in (
            "block_q",
            "block_kv",
            "block_kv_compute",
            "block_q_dkv",
            "block_kv_dkv",
            "block_kv_dkv_compute",
            "block_q_dq",
            "block_kv_dq",
        )
    }
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
            block_sizes=splash.BlockSizes(**blocks),
            residual_checkpoint_name=MADE,
        )
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    longer = lambda x: jnp.pad(x, [(0, 0), (0, length - time)] + [(0, 0)] * (x.ndim - 2))
    first = lambda x: jnp.swapaxes(longer(x), 1, 2)
    segments = None if segment_ids is None else longer(segment_ids)
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    out = jax.vmap(kernel)(first(query), first(key), first(value), ids)
    return jnp.swapaxes(out, 1, 2)[:, :time].astype(value.dtype)
