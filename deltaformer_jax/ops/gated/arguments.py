"""The shared body of the two gated ops: checks the arguments, turns segment ids into flags and calls the chosen
implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from deltaformer_jax.ops.common import checks
from deltaformer_jax.ops.common.compiled import compiled
from deltaformer_jax.ops.common.dispatch import BACKENDS, check_implementation, dispatch
from deltaformer_jax.ops.common.tiles import accumulation_dtype
from deltaformer_jax.ops.gated.chunked import Inputs, Plan, chunk_rows, gated_chunked
from deltaformer_jax.ops.gated.definition import recurrent
from deltaformer_jax.ops.gated.kernels import bind

FORMS = ("recurrent", "chunked")


def run_gated(
    query, key, value, *, beta, log_decay, scale, initial_state, segment_ids, chunk_size, implementation, delta
) -> tuple[jax.Array, jax.Array]:
    """(output, final_state) of gated_delta_rule (`delta`) or gated_linear_attention."""
    check_gated_heads(query, key, value)
    check_implementation("gated", implementation, FORMS)
    checks.check_size("chunk_size", chunk_size)
    scale = checks.check_scale("scale", scale, key.shape[3])
    segment_ids = checks.as_segment_ids(segment_ids, key)
    head = tuple(value.shape[:3])
    beta = checks.as_gate("beta", beta, "value heads", [head], value)
    shapes = [head, (*head, key.shape[3])]
    log_decay = checks.as_log_decay(log_decay, "value heads", shapes, segment_ids, value)
    state_shape = (value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    check_state(initial_state, state_shape)
    plan = Plan(scale, chunk_rows(64 if chunk_size is None else chunk_size, value.shape[1]), delta)
    return _run(plan, implementation, (query, key, value, beta, log_decay, initial_state), segment_ids)


@compiled(2, "'recurrent'")
def _run(plan, implementation, arrays, segment_ids):
    *arrays, state = arrays
    key, value = arrays[1:3]
    if state is None:
        # full_like instead of zeros: inside shard_map the state must vary over the same mesh axes as value.
        shape = (value.shape[0], value.shape[2], key.shape[3], value.shape[3])
        state = lax.full_like(value, 0, accumulation_dtype(value.dtype), shape)
    inputs = Inputs(*arrays, state, *flags_of(segment_ids))
    if implementation == "recurrent" or (value.shape[1] == 1 and implementation not in BACKENDS["gated"]):
        # A chunk of one token would be one step of the recurrence, so the step is taken directly.
        return recurrent(*inputs, scale=plan.scale, delta=plan.delta)
    chunked = functools.partial(gated_chunked, plan)
    return dispatch("gated", implementation, inputs, chunked=chunked, bind=functools.partial(bind, plan, inputs))


def flags_of(segment_ids):
    """(real, resets), both [B, T] bools: `real` is False at padding; `resets` is True at the first token of every
    segment but the first of its row."""
    if segment_ids is None:
        return None, None
    real = segment_ids != 0
    if segment_ids.shape[1] == 1:
        return real, None
    before = jnp.concatenate([jnp.zeros_like(segment_ids[:, :1]), segment_ids[:, :-1]], axis=1)
    starts = real & (segment_ids != before)
    return real, starts & (jnp.cumsum(starts, axis=1, dtype=jnp.int32) > 1)


def check_gated_heads(query, key, value):
    """Raise if the arrays are not query, key [B,T,H,K], value [B,T,Hv,V] of one dtype, or Hv is no multiple of H."""
    checks.check_heads(None, key, None)
    checks.check_heads(query, key, None)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"query has {query.shape[2]} heads but key has {key.shape[2]}: they must have the same number")
    if not hasattr(value, "dtype") or not hasattr(value, "ndim"):
        raise TypeError(f"value must be an array, not {type(value).__name__}")
    if value.ndim != 4:
        raise ValueError(f"value must have shape [batch, time, heads, width]; it has shape {tuple(value.shape)}")
    if value.dtype != key.dtype:
        raise TypeError(f"value is {value.dtype} but key is {key.dtype}: cast them to one dtype")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(f"value has [batch, time] {value.shape[:2]} but key has {key.shape[:2]}: make them equal")
    if value.shape[2] == 0 or value.shape[3] == 0:
        raise ValueError(f"value has shape {tuple(value.shape)}: heads and width must be at least 1")
    checks.check_multiple("value", value.shape[2], key.shape[2])


def check_state(state, expected):
    """Raise if `state` is neither None nor a float array of the shape `expected`."""
    if state is None:
        return
    if not hasattr(state, "shape") or tuple(state.shape) != expected:
        found = tuple(state.shape) if hasattr(state, "shape") else type(state).__name__
        raise ValueError(
            f"initial_state must have shape [batch, value heads, key width, value width] = {expected}; it has {found}"
        )
    if state.dtype not in checks.FLOATS:
        raise TypeError(f"initial_state has dtype {state.dtype}: cast it to a float dtype")
