"""Which form an op takes when its sequence is sharded over a mesh axis of P devices.

    op                        P divides all heads         otherwise
    delta_attention           all-to-all over heads       the chain's pipeline
    causal_attention          all-to-all over heads       the ring
    the recurrent ops         states, whatever the heads are
    another function          all-to-all over heads       an error

All-to-all comes first because the op runs as on one device, with its kernels, and no device waits for another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from jax import lax

from deltaformer_jax.ops import (
    causal_attention,
    delta_attention,
    gated_delta_rule,
    gated_linear_attention,
    generalized_delta_rule,
)
from deltaformer_jax.ops.position_bias import BIASES
from deltaformer_jax.sharding.context.chain import delta_attention_pipeline
from deltaformer_jax.sharding.context.heads import heads_divide, over_heads
from deltaformer_jax.sharding.context.ring import causal_attention_ring
from deltaformer_jax.sharding.context.states import (
    gated_delta_rule_states,
    gated_linear_attention_states,
    generalized_delta_rule_states,
)

_STATES = {
    gated_delta_rule: gated_delta_rule_states,
    generalized_delta_rule: generalized_delta_rule_states,
    gated_linear_attention: gated_linear_attention_states,
}
_WHOLE_HEADS = {delta_attention: delta_attention_pipeline, causal_attention: causal_attention_ring}


def over_context(op: Callable, arrays: dict[str, jax.Array | None], axis_name: str):
    """op(**arrays) of a sequence that is sharded over the mesh axis `axis_name`, inside shard_map.

    op: one of the ops with options bound by `functools.partial`, or a function of your own of whole sequences, in which
    heads are independent. arrays: as in `over_heads`. Raises ValueError or NotImplementedError if the form does not
    support the call; no form supports a position bias.
    """
    if given := [name for name in BIASES if arrays.get(name) is not None]:
        raise NotImplementedError(f"{given[0]}: a sequence that is sharded over devices has none; set mesh.context=1")
    function, options = (op.func, op.keywords) if isinstance(op, functools.partial) and not op.args else (op, {})
    if function in _STATES:
        return _STATES[function](axis_name, **arrays, **options)
    if function in _WHOLE_HEADS and not heads_divide(arrays, lax.axis_size(axis_name)):
        return _WHOLE_HEADS[function](axis_name, **arrays, **options)
    return over_heads(op, arrays, axis_name)
