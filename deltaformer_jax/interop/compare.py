"""Whether two configs are the same model, and in which fields they differ.

A field may say a thing in two ways, as value_dim = 0 and value_dim = head_dim do. So what is compared is what the
mixers' constructors get, with what their defaults stand for.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.config.rope_scaling import parse
from deltaformer_jax.interop.sources.base import layers
from deltaformer_jax.layers.mixers.build import block_setting, resolved_fields
from deltaformer_jax.layers.mixers.feed_forward import READ_BY, feed_forward_width

# Fields that say how to compute, not what.
_HOW = ("chunk_size", "implementation")
# Of the whole model.
_WHOLE = (
    *("vocab_size", "d_model", "num_layers", "norm_epsilon", "norm_gain", "tie_embeddings", "embedding_scale"),
    "normalise_head",
)
# What an argument that is None stands for.
_NONE_IS = {
    "num_value_heads": "num_heads",
    "value_dim": "head_dim",
    "qk_norm_epsilon": "norm_epsilon",
    "output_norm_epsilon": "norm_epsilon",
}


def differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields in which `other` is another model than `config`, as "model.FIELD = VALUE" with config's values."""
    found = {name: getattr(config, name) for name in _WHOLE if getattr(config, name) != getattr(other, name)}
    ours, theirs = layers(config), layers(other)
    if [mixer.name for mixer in ours] != [mixer.name for mixer in theirs]:
        found["mixers"] = config.mixers
    else:
        for one, two in zip(ours, theirs, strict=True):
            values, others = _meaning(config, one), _meaning(other, two)
            found |= {name: value for name, value in values.items() if value != others.get(name)}
    return [f"model.{name} = {value!r}" for name, value in sorted(found.items())]


def _meaning(config: ModelConfig, mixer: Mixer) -> dict[str, Any]:
    """What the fields of one layer mean."""
    values = resolved_fields(config, mixer)
    for name, instead in _NONE_IS.items():
        if name in values and values[name] is None:
            values[name] = values[instead]
    if values.get("write_rope_base") == "rope_base":
        values["write_rope_base"] = values["rope_base"]
    if "gate_rank" in values:
        rank = values["gate_rank"]
        values["gate_rank"] = (rank or values["head_dim"], rank or values["value_dim"])
    if "rope_scaling" in values:  # whose numbers may be written otherwise
        values["rope_scaling"] = parse(values["rope_scaling"])
    for name in ("norm_placement", "ffn_shift_rank"):
        values[name] = block_setting(config, mixer, name)
    values["mlp_dim"] = feed_forward_width(config, mixer)
    values["feed_forward"] = block_setting(config, mixer, "feed_forward")
    for name in READ_BY.get(values["feed_forward"], ()):
        values[name] = block_setting(config, mixer, name)
    return {name: value for name, value in values.items() if name not in _HOW}
