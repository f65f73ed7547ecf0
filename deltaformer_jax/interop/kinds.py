"""What kind of value each known field of another project's config.json must have. null stands for an absent field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, NamedTuple


class Kind(NamedTuple):
    said: str
    holds: Callable[[Any], bool]


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf


def _list_of(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


_COUNT = Kind("a whole number above 0", lambda value: _whole(value, 1))
# A layer is some objects here before any tensor is looked at: an absurd number must not fill the memory.
_MOST_LAYERS = 10_000
_DEPTH = Kind(f"a whole number from 1 to {_MOST_LAYERS:,}", lambda value: _whole(value, 1) and value <= _MOST_LAYERS)
_SIZE = Kind("a whole number, 0 or more", lambda value: _whole(value, 0))
_POSITIVE = Kind("a number above 0", lambda value: _number(value) and value > 0)
_NUMBER = Kind("a number", _number)
_SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
_OBJECT = Kind("an object", lambda value: isinstance(value, dict))
_KINDS = {
    _COUNT: """hidden_size intermediate_size vocab_size num_attention_heads num_key_value_heads
        num_heads num_kv_heads num_v_heads head_dim linear_num_key_heads linear_num_value_heads linear_key_head_dim
        linear_value_head_dim linear_num_heads linear_head_dim linear_conv_kernel_dim conv_size short_conv_kernel_size
        layer_group_size max_position_embeddings full_attention_interval
        original_max_position_embeddings""",
    _DEPTH: "num_hidden_layers",
    _SIZE: "bos_token_id window_size sliding_window mtp_num_hidden_layers",
    _POSITIVE: """hidden_ratio expand_k expand_v rms_norm_eps norm_eps rope_theta partial_rotary_factor factor
        low_freq_factor high_freq_factor attention_factor beta_fast beta_slow""",
    _NUMBER: "lower_bound linear_lower_bound kda_lower_bound gate_lower_bound",
    _SWITCH: """tie_word_embeddings attention_bias mlp_bias qkv_bias conv_bias use_short_conv use_gate use_beta
        use_output_gate use_sliding_window safe_gate kda_safe_gate allow_neg_eigval linear_allow_neg_eigval
        attn_output_gate truncate fuse_norm""",
    Kind("a whole number", lambda value: _whole(value, -1)): "pad_token_id",
    Kind(
        "a whole number, 0 or more, or a list of them",
        lambda value: _whole(value, 0) or _list_of(lambda part: _whole(part, 0))(value),
    ): "eos_token_id",
    _OBJECT: "rope_parameters rope_scaling linear_attn_config",
    Kind("a list of names", _list_of(lambda value: isinstance(value, str))): "layer_types",
    Kind("a list of layers' numbers", _list_of(lambda value: _whole(value, 0))): "layers kda_layers full_attn_layers",
    Kind(
        "an object or a list of objects",
        lambda value: isinstance(value, dict) or _list_of(lambda part: isinstance(part, dict))(value),
    ): "attn",
}
_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def misfits(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A sentence for each known field whose value is of another kind. prefix: what the fields' names begin with."""
    return [
        f"{prefix}{name} = {value!r}: give {_OF[name].said}"
        for name, value in values.items()
        if name in _OF and value is not None and not _OF[name].holds(value)
    ]


def unknown(values: Mapping[str, Any], known: str, prefix: str = "") -> list[str]:
    """A sentence for each field that is not among `known` and not null."""
    return [
        f"{prefix}{name} = {value!r}: is not known here"
        for name, value in values.items()
        if name not in known.split() and value is not None
    ]
