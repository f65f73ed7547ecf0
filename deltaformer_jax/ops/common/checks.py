"""Argument checks that the ops share. Shapes and dtypes are checked while tracing, values only if they are concrete."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax.ops.common.tiles import accumulation_dtype

FLOATS = (jnp.float64, jnp.float32, jnp.bfloat16, jnp.float16)


def check_tokens(name, x):
    """Raise if x is not an array [B, T, heads, width] of a float dtype with at least one token, head and channel."""
    if not hasattr(x, "dtype") or not hasattr(x, "ndim"):
        raise TypeError(f"{name} must be an array, not {type(x).__name__}")
    if x.ndim != 4:
        raise ValueError(f"{name} must have shape [batch, time, heads, width]; it has shape {tuple(x.shape)}")
    check_float(name, x.dtype)
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: time, heads and width must be at least 1")


def check_float(name, dtype):
    if dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {dtype}: cast it to float64, float32, bfloat16 or float16")


def check_heads(query, key, value):
    """Raise if the arrays are not query [B,T,H,K], key [B,T,G,K], value [B,T,G,V] of one float dtype, with H a multiple
    of G. `query` and `value` may be None."""
    arrays = {"query": query, "key": key, "value": value}
    for name, x in arrays.items():
        if x is None:
            continue
        check_tokens(name, x)
        if x.dtype != key.dtype:
            raise TypeError(f"{name} is {x.dtype} but key is {key.dtype}: cast them to one dtype")
        if x.shape[:2] != key.shape[:2]:
            raise ValueError(f"{name} has [batch, time] {x.shape[:2]} but key has {key.shape[:2]}: make them equal")
    if value is not None and value.shape[2] != key.shape[2]:
        raise ValueError(f"value has {value.shape[2]} heads but key has {key.shape[2]}: they must have the same number")
    if query is not None:
        if query.shape[3] != key.shape[3]:
            raise ValueError(f"query has width {query.shape[3]} but key has {key.shape[3]}: make them equal")
        check_multiple("query", query.shape[2], key.shape[2])


def check_multiple(name, heads, key_heads):
    if heads % key_heads:
        raise ValueError(f"{name} has {heads} heads: it must be a multiple of key's {key_heads} heads")


def as_gate(name, gate, heads, shapes, like):
    """`gate` as a float array of one of `shapes`, or None if it is None. A number is broadcast to the first shape.

    A Python number gets the accumulation dtype of `like`. `heads` names the heads in error messages, for example
    "query heads".
    """
    if gate is None:
        return None
    if isinstance(gate, (int, float)) and not isinstance(gate, bool):
        gate = np.asarray(gate, accumulation_dtype(like.dtype))
    if not hasattr(gate, "shape") or not hasattr(gate, "dtype") or (gate.shape != () and gate.shape not in shapes):
        found = tuple(gate.shape) if hasattr(gate, "shape") else type(gate).__name__
        channel = f" or, for each key channel, {shapes[1]}" if len(shapes) > 1 else ""
        expected = f"[batch, time, {heads}] = {shapes[0]}{channel}"
        raise ValueError(f"{name} must have shape {expected} or be one number; it has {found}")
    if gate.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {gate.dtype}: cast it to a float dtype")
    return jnp.broadcast_to(gate, shapes[0]) if gate.shape == () else gate


def as_log_decay(log_decay, heads, shapes, segment_ids, like):
    """`as_gate` for log_decay. If its values are known, they must be finite and at most 0 at every real token."""
    log_decay = as_gate("log_decay", log_decay, heads, shapes, like)
    if log_decay is not None:
        _check_decay_values(log_decay, segment_ids)
    return log_decay


def _check_decay_values(log_decay, segment_ids):
    values, ids = concrete_value(log_decay), None if segment_ids is None else concrete_value(segment_ids)
    if values is None or (segment_ids is not None and ids is None):
        return
    if ids is not None:
        values = values[ids != 0]
    if not np.all(np.isfinite(values)):
        raise ValueError(
            "log_decay holds -inf, inf or NaN: it must be finite and at most 0; to forget everything, pass -1000, "
            "whose exponential is 0"
        )
    if np.any(values > 0):
        raise ValueError(
            f"log_decay holds {float(values.max()):.3g}: the natural log of a decay must be at most 0; pass, for "
            "example, jax.nn.log_sigmoid(x) or -jax.nn.softplus(x)"
        )


def check_sinks(sinks, heads):
    """Raise if `sinks` is neither None nor a float array [heads], one logit per query head."""
    if sinks is None:
        return
    if not hasattr(sinks, "shape") or tuple(sinks.shape) != (heads,):
        found = tuple(sinks.shape) if hasattr(sinks, "shape") else type(sinks).__name__
        raise ValueError(f"sinks must have shape [query heads] = ({heads},); it has {found}")
    if sinks.dtype not in FLOATS:
        raise TypeError(f"sinks has dtype {sinks.dtype}: cast it to a float dtype")


def as_segment_ids(segment_ids, key):
    """segment_ids [B, T] as int32, the dtype that the kernels need. Raises if they are not an integer array [B, T], or
    if their values are known and an id occurs in two separate runs of a row."""
    if segment_ids is None:
        return None
    if not hasattr(segment_ids, "shape") or tuple(segment_ids.shape) != tuple(key.shape[:2]):
        shape = tuple(segment_ids.shape) if hasattr(segment_ids, "shape") else type(segment_ids).__name__
        raise ValueError(f"segment_ids must have shape [batch, time] = {tuple(key.shape[:2])}; it has {shape}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids has dtype {segment_ids.dtype}: it must be an integer array")
    concrete = concrete_value(segment_ids)
    if concrete is not None:
        _check_runs(concrete)
    return as_int32(segment_ids) if segment_ids.dtype.itemsize <= 4 else renumbered(segment_ids)


def as_int32(integers):
    """An integer array as int32. In a narrower type, sums could overflow."""
    return integers if integers.dtype == jnp.int32 else integers.astype(jnp.int32)


def renumbered(ids):
    """64-bit ids as int32: each run of equal ids gets the number of changes before it, plus 1; 0 (padding) stays 0.

    A cast alone could make two different ids equal.
    """
    changes = ids[:, 1:] != ids[:, :-1]
    number = jnp.cumsum(jnp.pad(changes, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32) + 1
    return jnp.where(ids != 0, number, 0)


def _check_runs(ids):
    """Raise if an id occurs in two separate runs of a row. The two runs would see each other in some implementations
    and not in others."""
    for row in ids:
        starts = row[np.concatenate([[True], row[1:] != row[:-1]])]
        starts = starts[starts != 0]
        if len(np.unique(starts)) != len(starts):
            raise ValueError(
                "segment_ids: an id occurs in two separate runs of the same row; give every run an id of its own"
            )


def check_size(name, size):
    """Raise if `size` is neither a positive Python or NumPy integer nor None."""
    if size is not None and not _is_count(size):
        raise ValueError(f"{name}={size!r}: it must be a positive integer or None")


def check_count(name, size):
    """Raise if `size` is not a positive Python or NumPy integer."""
    if not _is_count(size):
        raise ValueError(f"{name}={size!r}: it must be a positive integer")


def _is_count(size):
    return isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size >= 1


def check_selection(keep, initial, window, key, chosen=False):
    """Raise if `window` is no size, `initial` no integer of at least 0, `keep` neither None nor bools [B, T], or if
    there is no window for `keep` or `initial` to reach behind. `chosen`: there is a cache that remembers them."""
    check_size("window", window)
    if not isinstance(initial, (int, np.integer)) or isinstance(initial, bool) or initial < 0:
        raise ValueError(f"initial={initial!r}: it must be an integer of at least 0")
    if keep is not None:
        if not hasattr(keep, "shape") or tuple(keep.shape) != tuple(key.shape[:2]):
            found = tuple(keep.shape) if hasattr(keep, "shape") else type(keep).__name__
            raise ValueError(f"keep must have shape [batch, time] = {tuple(key.shape[:2])}; it has {found}")
        if keep.dtype != bool:
            raise TypeError(f"keep has dtype {keep.dtype}: it must be bool, True for tokens that stay visible")
    if window is None and not chosen and (keep is not None or initial):
        raise ValueError("keep and initial need a window: without one every earlier token is visible; give window=")


def check_scale(name, scale, width):
    """The scale as a Python float. None means width ** -0.5."""
    if scale is None:
        return float(width) ** -0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.number)) or not np.isfinite(scale):
        raise ValueError(f"{name}={scale!r}: it must be a finite Python number or None")
    return float(scale)


def concrete_value(x):
    """x as a NumPy array if its value is known; None if x is traced."""
    if isinstance(x, jax.core.Tracer):
        return None
    return np.asarray(x)


def check_write_query(write_query, query, key):
    """Raise if `write_query` is not an array [B, T, Hu, K] of key's dtype. Hu must be the number of key heads or of
    query heads; if `query` is None, any multiple of the number of key heads."""
    if not hasattr(write_query, "ndim") or write_query.ndim != 4:
        found = f"an array of shape {tuple(write_query.shape)}" if hasattr(write_query, "shape") else repr(write_query)
        raise ValueError(f'write_query is {found}: give "key", "query" or an array [batch, time, heads, width]')
    if write_query.dtype != key.dtype:
        raise TypeError(f"write_query is {write_query.dtype} but key is {key.dtype}: cast them to one dtype")
    if write_query.shape[:2] != key.shape[:2] or write_query.shape[3] != key.shape[3]:
        raise ValueError(
            f"write_query has shape {tuple(write_query.shape)} but key has {tuple(key.shape)}: make batch, time and "
            "width equal"
        )
    heads = write_query.shape[2]
    if query is None:
        check_multiple("write_query", heads, key.shape[2])
    elif heads not in (key.shape[2], query.shape[2]):
        raise ValueError(
            f"write_query has {heads} heads: it must have as many as key ({key.shape[2]}) or query ({query.shape[2]})"
        )


def check_one_document(segment_ids):
    """Raise if a row has more than one segment, where values are known. A cache holds one document per row, so the ids
    may only mark padding."""
    if segment_ids is None:
        return
    concrete = concrete_value(segment_ids)
    if concrete is None:
        return
    for row in concrete:
        if len(np.unique(row[row != 0])) > 1:
            raise ValueError(
                "segment_ids: a row has several ids, but a cache holds one document per row; use one id and 0 for "
                "padding, or put each document in a row of its own"
            )
