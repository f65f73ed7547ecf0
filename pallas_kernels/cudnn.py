"""cuDNN's flash attention for NVIDIA GPUs, through jax.nn.dot_product_attention, as a fast Transformer baseline.

It takes bfloat16 and float16 and sums in float32. It returns only the output and no log-sum-exps, so that log_decay and
sinks cannot be added from outside.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def lacks(query, key, value, log_decay, sinks) -> str | None:
    """Why cuDNN does not support this call, or None if it does."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention takes bfloat16 and float16, not {query.dtype}"
    widths = key.shape[3], value.shape[3]
    if widths[0] != widths[1] or widths[0] % 8 or widths[0] > 128:
        return (
            "cuDNN's attention needs keys and values of the same head dimension, a multiple of 8 up to 128; "
            f"they have {widths[0]} and {widths[1]}"
        )
    if not device_is_here():
        return "cuDNN's attention needs an NVIDIA device while tracing, and this process sees none"
    return None if log_decay is None and sinks is None else "it supports neither log_decay nor sinks"


@functools.cache
def device_is_here() -> bool:
    """Whether this process sees an NVIDIA device."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def attend(query, key, value, segment_ids, *, scale, window):
    """Causal attention: query [B,T,H,K], key and value [B,T,G,K], segment_ids [B,T] or None -> [B,T,H,K].

    With segments, it builds a mask of T² bools per batch row. JAX's function gives its residuals no name, so a
    rematerialised block runs its forward pass again, whatever the policy.
    """
    mask, time = None, key.shape[1]
    if segment_ids is not None:
        if time % 2:
            # With a mask, cuDNN needs an even length.
            one_more = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
            query, key, value, segment_ids = map(one_more, (query, key, value, segment_ids))
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    local = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
    )
    return out[:, :time]
