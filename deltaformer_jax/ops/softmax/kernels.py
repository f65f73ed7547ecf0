"""The vendors' flash attention behind `causal_attention`, so that a Transformer baseline is as fast as it can be:
cuDNN's on NVIDIA (through jax.nn.dot_product_attention), JAX's splash attention on TPU.

Both take bfloat16 (cuDNN float16 too) and keep sums in float32. Neither returns what decays and sinks need.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import heads as H

# Splash works on tiles of rows and columns whose sides are multiples of this.
LANES = 128


def lacks_cudnn(query, key, value, log_decay, sinks) -> str | None:
    """Why cuDNN cannot do this call, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention takes bfloat16 and float16, not {query.dtype}"
    if key.shape[3] != value.shape[3] or key.shape[3] % 8 or key.shape[3] > 128:
        return f"cuDNN's attention needs keys and values of one width, a multiple of 8 up to 128; {_widths(key, value)}"
    if not cudnn_is_here():
        return "cuDNN's attention asks for its version and the device's while tracing: no NVIDIA device is here"
    return _lacks_both(log_decay, sinks)


def lacks_splash(query, key, value, log_decay, sinks) -> str | None:
    """Why splash attention cannot do this call, or None."""
    if query.dtype != jnp.bfloat16:
        return f"splash attention multiplies in bfloat16: cast the inputs, which are {query.dtype}"
    if key.shape[3] != value.shape[3]:
        return f"splash attention needs keys and values of one width; {_widths(key, value)}"
    return _lacks_both(log_decay, sinks)


def _widths(key, value):
    return f"they have {key.shape[3]} and {value.shape[3]}"


def _lacks_both(log_decay, sinks):
    return None if log_decay is None and sinks is None else "it has neither log_decay nor sinks"


@functools.cache
def cudnn_is_here() -> bool:
    """Whether this process sees an NVIDIA device."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def cudnn_attention(query, key, value, segment_ids, *, scale, window):
    """[B,T,H,K], [B,T,G,K], [B,T,G,K], [B,T] or None -> [B,T,H,K]. With segments a mask of T² booleans a row."""
    mask, time = None, key.shape[1]
    if segment_ids is not None:
        if time % 2:
            # cuDNN wants even lengths where there is a mask.
            query, key, value, segment_ids = (H.pad_time(x, time + 1) for x in (query, key, value, segment_ids))
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    local = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
    )
    return out[:, :time]


def splash_attention(query, key, value, segment_ids, *, scale, window, interpret=False):
    """[B,T,H,K], [B,T,G,K], [B,T,G,K], [B,T] or None -> [B,T,H,K]. T is filled up to a multiple of 128 inside."""
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
        )
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    first = lambda x: H.heads_first(H.pad_time(x, length))
    segments = H.pad_time(segment_ids, length)
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    out = jax.vmap(kernel)(first(query), first(key), first(value), ids)
    return H.heads_last(out)[:, :time].astype(value.dtype)


def fastest_attention(query, key, value, log_decay, sinks, segment_ids, *, scale, window, default):
    """`default()` or the vendor's kernel where it can do the call, by the platform the program is compiled for."""
    kernels = {}
    if lacks_splash(query, key, value, log_decay, sinks) is None:
        kernels["tpu"] = splash_attention
    if lacks_cudnn(query, key, value, log_decay, sinks) is None:
        kernels["cuda"] = cudnn_attention
    if not kernels:
        return default(query, key, value, segment_ids)
    bound = {name: functools.partial(kernel, scale=scale, window=window) for name, kernel in kernels.items()}
    return lax.platform_dependent(query, key, value, segment_ids, default=default, **bound)
