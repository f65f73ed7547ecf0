"""flash-linear-attention's models: one table for each of its mixers, and what their configs have in common.

Read from the package fla-core 0.6.0. A layer of an "attn" hybrid is a layer of its `transformer`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.interop.fields import Fields
from deltaformer_jax.interop.layouts import CONVOLUTION, FROM_HEADS, LINEAR, VECTOR
from deltaformer_jax.interop.sources.base import Shapes, Source, layers
from deltaformer_jax.interop.sources.fla_hybrids import attention, hybrid, say_hybrid
from deltaformer_jax.interop.tables import Row
from deltaformer_jax.layers.mixers.feed_forward import feed_forward_width

IGNORED = """fuse_norm fuse_swiglu fuse_cross_entropy fuse_linear_cross_entropy use_l2warp attn_mode
    rope_max_position_embeddings hidden_ratio intermediate_size"""
OUTSIDE = {"table": "model.embeddings.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}

BLOCK = [
    Row("attn_norm.weight", "mixer_norm.scale", VECTOR),
    Row("mlp_norm.weight", "mlp_norm.scale", VECTOR),
    Row("mlp.gate_proj.weight", "mlp.gate", LINEAR),
    Row("mlp.up_proj.weight", "mlp.up", LINEAR),
    Row("mlp.down_proj.weight", "mlp.down", LINEAR),
]
ATTENTION = [
    Row("attn.q_proj.weight", "mixer.inputs.query", LINEAR),
    Row("attn.k_proj.weight", "mixer.inputs.key", LINEAR),
    Row("attn.v_proj.weight", "mixer.inputs.value", LINEAR),
    Row("attn.q_proj.bias", "mixer.inputs.query_bias", VECTOR),
    Row("attn.k_proj.bias", "mixer.inputs.key_bias", VECTOR),
    Row("attn.v_proj.bias", "mixer.inputs.value_bias", VECTOR),
    Row("attn.q_norm.weight", "mixer.inputs.query_norm.scale", VECTOR),
    Row("attn.k_norm.weight", "mixer.inputs.key_norm.scale", VECTOR),
    Row("attn.o_proj.weight", "mixer.output", FROM_HEADS),
    Row("attn.g_proj.weight", "mixer.output_gate.kernel", LINEAR),
    Row("attn.f_proj.weight", "mixer.forget.kernel", LINEAR),
    Row("attn.f_proj.bias", "mixer.forget.bias", VECTOR),
]
DELTAFORMER = [
    *ATTENTION,
    Row("attn.b_proj.weight", "mixer.beta_gate.kernel", LINEAR),
    Row("attn.b_proj.bias", "mixer.beta_gate.bias", VECTOR),
]
MEMORY = [
    Row("attn.q_proj.weight", "mixer.inputs.query", LINEAR),
    Row("attn.k_proj.weight", "mixer.inputs.key", LINEAR),
    Row("attn.v_proj.weight", "mixer.inputs.value", LINEAR),
    Row("attn.q_conv1d.weight", "mixer.inputs.convolutions.0.weight", CONVOLUTION),
    Row("attn.k_conv1d.weight", "mixer.inputs.convolutions.1.weight", CONVOLUTION),
    Row("attn.v_conv1d.weight", "mixer.inputs.convolutions.2.weight", CONVOLUTION),
    Row("attn.b_proj.weight", "mixer.beta.kernel", LINEAR),
]
DELTA_NET = [
    *MEMORY,
    Row("attn.g_proj.weight", "mixer.output.gate", LINEAR),
    Row("attn.o_norm.weight|attn.norm.weight", "mixer.output.norm.norm.scale", VECTOR),
    Row("attn.o_proj.weight", "mixer.output.output", FROM_HEADS),
]
GATED_DELTANET = [
    *DELTA_NET,
    Row("attn.a_proj.weight", "mixer.decay.kernel", LINEAR),
    Row("attn.A_log", "mixer.decay.log_rate", VECTOR),
    Row("attn.dt_bias", "mixer.decay.bias", VECTOR),
]
KDA = [
    *MEMORY,
    Row("attn.f_proj.0.weight", "mixer.decay.down", LINEAR),
    Row("attn.f_proj.1.weight", "mixer.decay.up", LINEAR),
    Row("attn.A_log|attn.A", "mixer.decay.log_rate", VECTOR),
    Row("attn.dt_bias|attn.f_proj.1.bias", "mixer.decay.bias", VECTOR),
    Row("attn.g_proj.0.weight", "mixer.output.gate_down", LINEAR),
    Row("attn.g_proj.1.weight", "mixer.output.gate", LINEAR),
    Row("attn.g_proj.1.bias", "mixer.output.gate_bias", VECTOR),
    Row("attn.o_norm.weight", "mixer.output.norm.norm.scale", VECTOR),
    Row("attn.o_proj.weight", "mixer.output.output", FROM_HEADS),
]
RETNET = [
    *MEMORY,
    Row("attn.g_proj.weight", "mixer.output.gate", LINEAR),
    Row("attn.g_norm_swish_gate.weight|attn.g_norm.weight", "mixer.output.norm.norm.scale", VECTOR),
    Row("attn.o_proj.weight", "mixer.output.output", FROM_HEADS),
]
GLA = [
    *RETNET,
    Row("attn.gk_proj.0.weight", "mixer.decay_down", LINEAR),
    Row("attn.gk_proj.1.weight", "mixer.decay_up", LINEAR),
    Row("attn.gk_proj.1.bias", "mixer.decay_bias", VECTOR),
]


def _common(fields: Fields, ratio: int = 4) -> dict[str, Any]:
    """The fields of ModelConfig that all of its models have."""
    width = fields.take("hidden_size")
    # null stands for 4 in every class.
    inner = int(width * fields.take("hidden_ratio", 4 if fields.has("hidden_ratio") else ratio) * 2 / 3)
    fields.only("hidden_act", "swish", "silu")
    fields.only("elementwise_affine", True)
    return dict(
        d_model=width,
        num_layers=fields.take("num_hidden_layers"),
        vocab_size=fields.take("vocab_size"),
        mlp_dim=fields.take("intermediate_size", 256 * -(-inner // 256)),
        norm_epsilon=fields.take("norm_eps", 1e-6),
        tie_embeddings=fields.take("tie_word_embeddings", False),
        embedding_scale="one",
    )


def _say_common(config: ModelConfig) -> dict[str, Any]:
    return dict(
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        vocab_size=config.vocab_size,
        intermediate_size=feed_forward_width(config, config.mixers[0]),
        norm_eps=config.norm_epsilon,
        tie_word_embeddings=config.tie_embeddings,
        hidden_act="swish",
    )


# Each model_type: its config read, and said again.


def _read_transformer(fields: Fields, **own: Any) -> ModelConfig:
    common, heads = _common(fields), fields.take("num_heads")
    fields.divides("num_heads", "hidden_size")
    names = ("num_kv_heads", "qkv_bias", "qk_norm", "rope_theta", "window_size")
    taken = attention(heads, {name: fields.take(name, None) for name in names})
    fields.only("attnres_block_size", None)
    fields.finish()
    return ModelConfig(head_dim=common["d_model"] // heads, **common, **taken | own)


def _say_transformer(config: ModelConfig) -> dict[str, Any]:
    return _say_common(config) | dict(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        qkv_bias=config.qkv_bias,
        qk_norm=config.qk_norm,
        window_size=config.window or None,
        rope_theta=config.rope_base,
    )


def _read_forgetting(fields: Fields) -> ModelConfig:
    fields.only("qk_norm", False)  # a GroupNorm there
    if window := fields.take("window_size", None):
        fields.refuse(f"window_size = {window!r}: its class sees all tokens of a text; set it to null")
    gate = "on" if fields.take("use_output_gate", False) else "auto"
    return _read_transformer(fields, mixers=("softmax_attention",), forget_gate=True, rope_base=0.0, output_gate=gate)


def _say_forgetting(config: ModelConfig) -> dict[str, Any]:
    said = _say_transformer(config) | dict(use_output_gate=config.output_gate == "on")
    return {name: value for name, value in said.items() if name != "rope_theta"}


def _read_deltaformer(fields: Fields) -> ModelConfig:
    fields.take("attn", None)  # ignored there too
    if window := fields.take("window_size", None):
        fields.refuse(f"window_size = {window!r}: its class sees all tokens of a text; set it to null")
    return _read_transformer(fields, mixers=("delta_former",), write_query="query", beta="raw")


def _say_deltaformer(config: ModelConfig) -> dict[str, Any]:
    if config.num_kv_heads != config.num_heads:
        raise ValueError(
            f"num_kv_heads = {config.num_kv_heads}: its class opens it, and then computes no grouped heads"
        )
    return {name: value for name, value in _say_transformer(config).items() if name != "window_size"}


def _convolutions(fields: Fields) -> dict[str, Any]:
    """SiLU stays if there is no convolution."""
    size, used = fields.take("conv_size", 4), fields.take("use_short_conv", True)
    if fields.take("conv_bias", False):
        fields.refuse("conv_bias = True: its class makes no such biases, and goes on without; set it to false")
    return dict(conv_size=size) if used else dict(conv_size=0, input_silu=True)


def _say_convolutions(config: ModelConfig) -> dict[str, Any]:
    if config.conv_size == 0:
        return dict(use_short_conv=False)
    return dict(use_short_conv=True, conv_size=_conv_size(config))


def _conv_size(config: ModelConfig) -> int:
    return 4 if config.conv_size < 0 else config.conv_size


def _read_delta_net(fields: Fields) -> ModelConfig:
    common, heads = _common(fields), fields.take("num_heads")
    keys, values = (_width(fields, common["d_model"], name, 1.0, heads) for name in ("expand_k", "expand_v"))
    fields.only("use_beta", True)
    fields.only("use_output_norm", True)
    fields.only("qk_norm", "l2")
    fields.only("qk_activation", "silu")
    fields.only("attnres_block_size", None)
    own = dict(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=keys,
        value_dim=values,
        output_gate="on" if fields.take("use_gate", False) else "off",
        negative_eigenvalues=fields.take("allow_neg_eigval", False),
        beta_bias=False,
    )
    return hybrid(fields, common, "delta_net", own | _convolutions(fields))


def _say_delta_net(config: ModelConfig) -> dict[str, Any]:
    return (
        _say_common(config)
        | say_hybrid(config)
        | _say_convolutions(config)
        | dict(
            num_heads=config.num_heads,
            expand_k=_ratio(config.num_heads * config.head_dim, config.d_model),
            expand_v=_ratio(config.num_heads * _value_dim(config), config.d_model),
            use_gate=config.output_gate == "on",
            allow_neg_eigval=config.negative_eigenvalues,
            use_beta=True,
            qk_norm="l2",
            qk_activation="silu",
        )
    )


def _value_dim(config: ModelConfig) -> int:
    return config.value_dim or config.head_dim


def _width(fields: Fields, base: int, name: str, default: float, heads: int = 1) -> int:
    """The features of a head: base * ratio / heads, for the ratio in the field `name`."""
    ratio = fields.take(name, default)
    whole = round(base * ratio)
    if not math.isclose(base * ratio, whole, rel_tol=1e-5) or not whole or whole % heads:
        each = f" for each of {heads} heads" if heads > 1 else ""
        fields.refuse(f"{name} = {ratio!r}: {base} * {ratio!r} = {base * ratio:g} is no whole number of features{each}")
        return 1
    return whole // heads


def _ratio(whole: int, base: int) -> float:
    """The ratio by which fla's classes come to `whole`; some of them cut base * ratio, others round it."""
    ratio = whole / base
    return ratio if int(base * ratio) == whole else math.nextafter(ratio, math.inf)


def _gated(fields: Fields, width: int, expand: float) -> dict[str, Any]:
    """What gated_deltanet and kda have in common. width, expand: what head_dim and expand_v are if absent."""
    heads, width = fields.take("num_heads"), fields.take("head_dim", width)
    fields.only("attnres_block_size", None)
    return dict(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width,
        num_value_heads=fields.take("num_v_heads", heads),
        value_dim=_width(fields, width, "expand_v", expand),
        negative_eigenvalues=fields.take("allow_neg_eigval", False),
        beta_bias=False,
    ) | _convolutions(fields)


def _say_gated(config: ModelConfig) -> dict[str, Any]:
    return (
        _say_common(config)
        | say_hybrid(config)
        | _say_convolutions(config)
        | dict(
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_v_heads=config.num_value_heads or config.num_heads,
            expand_v=_ratio(_value_dim(config), config.head_dim),
            allow_neg_eigval=config.negative_eigenvalues,
        )
    )


def _read_gated_deltanet(fields: Fields) -> ModelConfig:
    common, own = _common(fields), _gated(fields, 256, 2.0)
    activation = fields.take("output_gate_activation", "swish")
    fields.only("output_gate_activation", "swish", "silu", "sigmoid")
    own |= dict(output_gate="on" if fields.take("use_gate", True) else "off")
    own |= dict(output_gate_activation="sigmoid") if activation == "sigmoid" else {}
    return hybrid(fields, common, "gated_delta_net", own)


def _say_gated_deltanet(config: ModelConfig) -> dict[str, Any]:
    activation = "sigmoid" if config.output_gate_activation == "sigmoid" else "swish"
    return _say_gated(config) | dict(use_gate=config.output_gate != "off", output_gate_activation=activation)


def _read_kda(fields: Fields) -> ModelConfig:
    common, own = _common(fields), _gated(fields, 128, 1.0)
    own |= dict(output_gate="on", output_gate_bias=True, gate_rank=own["value_dim"])
    # Its kernels go by the bound; safe_gate says that they may count on it, and needs one.
    bound, safe = fields.take("lower_bound", None), fields.take("safe_gate", False)
    if (bound is not None and not bound < 0) or (safe and bound is None):
        fields.refuse(f"lower_bound = {bound!r}: give a number below 0{'; safe_gate needs one' * safe}")
    elif bound is not None:
        own |= dict(decay_lower_bound=float(bound))
    return hybrid(fields, common, "kimi_delta_attention", own)


def _say_kda(config: ModelConfig) -> dict[str, Any]:
    return _say_gated(config) | dict(
        safe_gate=-5 <= config.decay_lower_bound < 0, lower_bound=config.decay_lower_bound or None
    )


def _linear_memory(fields: Fields, ratio: int, expand: tuple[float, float]) -> tuple[dict, dict]:
    """What gla and retnet have in common: (the common fields, the mixer's)."""
    common, heads = _common(fields, ratio), fields.take("num_heads")
    keys, values = (
        _width(fields, common["d_model"], name, ratio, heads) for name, ratio in zip(("expand_k", "expand_v"), expand)
    )
    for name, allowed in (
        ("num_kv_heads", (None, heads)),
        ("feature_map", (None,)),
        ("use_short_conv", (False,)),
        ("clamp_min", (None,)),
        ("attnres_block_size", (None,)),
        ("use_gk", (True,)),
        ("use_gv", (False,)),
    ):
        fields.only(name, *allowed)
    fields.take("conv_size", None)
    own = dict(num_heads=heads, num_kv_heads=heads, head_dim=keys, value_dim=values)
    return common, own | dict(output_gate="on" if fields.take("use_output_gate", True) else "off")


def _say_linear_memory(config: ModelConfig) -> dict[str, Any]:
    return (
        _say_common(config)
        | say_hybrid(config)
        | dict(
            num_heads=config.num_heads,
            expand_k=_ratio(config.num_heads * config.head_dim, config.d_model),
            expand_v=_ratio(config.num_heads * _value_dim(config), config.d_model),
            use_output_gate=config.output_gate != "off",
            use_short_conv=False,
        )
    )


def _read_gla(fields: Fields) -> ModelConfig:
    common, own = _linear_memory(fields, 4, (0.5, 1.0))
    return hybrid(fields, common, "gated_linear_attention", own)


def _read_retnet(fields: Fields) -> ModelConfig:
    common, own = _linear_memory(fields, 2, (1.0, 2.0))
    return hybrid(fields, common, "retention", own)


def _source(model_type: str, class_name: str, read: Any, write: Any, mixer: str, rows: list[Row]) -> Source:
    tables = {mixer: BLOCK + rows} | ({"softmax_attention": BLOCK + ATTENTION} if mixer != "softmax_attention" else {})

    def say(config: ModelConfig) -> dict[str, Any]:
        own = next((layer for layer in layers(config) if layer.name == mixer), Mixer(mixer))
        return write(dataclasses.replace(config, **dict(own.overrides)))

    return Source(
        model_type, class_name, read, say, tables, OUTSIDE, IGNORED, _former, _is_former, dropped=(".attn.D",)
    )


def _is_former(shapes: Shapes) -> bool:
    """Files from before 2025-02-09 hold the feed-forward layer's gate over its up map in one tensor."""
    gate, up, down = (shapes.get(f"model.layers.0.mlp.{name}_proj.weight", ()) for name in ("gate", "up", "down"))
    return not up and len(gate) == len(down) == 2 and gate[0] == 2 * down[1]


def _former(rows: list[Row]) -> list[Row]:
    apart = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    together = Row("mlp.gate_proj.weight", ("mlp.gate", "mlp.up"), LINEAR)
    return [row for row in rows if row.theirs not in apart] + [together]


def _unfused(said: dict[str, Any]) -> bool:
    """Whether gla's and retnet's norm has the name that it has apart from its gate."""
    return not said["use_output_gate"] or said.get("fuse_norm") is False


def _read_plain(fields: Fields) -> ModelConfig:
    return _read_transformer(fields, mixers=("softmax_attention",))


SOURCES = [
    _source("deltaformer", "DeltaFormerForCausalLM", _read_deltaformer, _say_deltaformer, "delta_former", DELTAFORMER),
    _source("delta_net", "DeltaNetForCausalLM", _read_delta_net, _say_delta_net, "delta_net", DELTA_NET),
    _source(
        "gated_deltanet",
        "GatedDeltaNetForCausalLM",
        _read_gated_deltanet,
        _say_gated_deltanet,
        "gated_delta_net",
        GATED_DELTANET,
    ),
    _source("kda", "KDAForCausalLM", _read_kda, _say_kda, "kimi_delta_attention", KDA),
    _source("gla", "GLAForCausalLM", _read_gla, _say_linear_memory, "gated_linear_attention", GLA)._replace(
        second_names=_unfused
    ),
    _source("retnet", "RetNetForCausalLM", _read_retnet, _say_linear_memory, "retention", RETNET)._replace(
        second_names=_unfused
    ),
    _source("transformer", "TransformerForCausalLM", _read_plain, _say_transformer, "softmax_attention", ATTENTION),
    _source(
        "forgetting_transformer",
        "ForgettingTransformerForCausalLM",
        _read_forgetting,
        _say_forgetting,
        "softmax_attention",
        ATTENTION,
    )._replace(has_positions=False),
]
