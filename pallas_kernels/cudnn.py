"""cuDNN's flash attention (NVIDIA), through jax.nn.dot_product_attention, so that a Transformer baseline is as fast as
it can be there.

It takes bfloat16 and float16, keeps sums in float32, and returns nothing that decays and sinks could be made from.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def lacks(query, key, value, log_decay, sinks) -> str | None:
    """Why cuDNN cannot do this call, or None."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention takes bfloat16 and float16, not {query.dtype}"
    widths = key.shape[3], value.shape[3]
    if widths[0] != widths[1] or widths[0] % 8 or widths[0] > 128:
        return (
            "cuDNN's attention needs keys and values of one width, a multiple of 8 up to 128; "
            f"they have {widths[0]} and {widths[1]}"
        )
    if not device_is_here():
        return "cuDNN's attention asks for its version and the device's while tracing: no NVIDIA device is here"
    return None if log_decay is None and sinks is None else "it has neither log_decay nor sinks"


@functools.cache
def device_is_here() -> bool:
    """Whether this process sees an NVIDIA device."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def attend(query, key, value, segment_ids, *, scale, window):
    """query [B,T,H,K], key and value [B,T,G,K], segment_ids [B,T] or None -> [B,T,H,K], causal.

    With segments a mask of T² booleans a row.
    """
    mask, time = None, key.shape[1]
    if segment_ids is not None:
        if time % 2:
            # cuDNN wants even lengths where there is a mask.
            one_more = lambda x: jnp.pad(x, [(0, 0), (0, 1)] + [(0, 0)] * (x.ndim - 2))
            query, key, value, segment_ids = map(one_more, (query, key, value, segment_ids))
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    local = None if window is None else (window - 1, 0)
    out = jax.nn.dot_product_attention(
        query, key, value, mask=mask, scale=scale, is_causal=True, local_window_size=local, implementation="cudnn"
    )
    return out[:, :time]
