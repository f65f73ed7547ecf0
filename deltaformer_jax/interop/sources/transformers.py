"""Models of the package transformers: llama, qwen3, the dense text models of qwen3_5, and olmo_hybrid.

Read from transformers 5.24.0. The names are those of the files, which are not always those of its modules.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.interop.fields import Fields
from deltaformer_jax.interop.layouts import CONVOLUTION, FROM_HEADS, LINEAR, VECTOR
from deltaformer_jax.interop.sources.base import Source, layers, pattern, setting
from deltaformer_jax.interop.sources.scaled_rope import FIELDS, read_scaling, say_scaling
from deltaformer_jax.interop.tables import Row
from deltaformer_jax.layers.mixers.feed_forward import feed_forward_width

OUTSIDE = {"table": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
MLP = [
    Row("mlp.gate_proj.weight", "mlp.gate", LINEAR),
    Row("mlp.up_proj.weight", "mlp.up", LINEAR),
    Row("mlp.down_proj.weight", "mlp.down", LINEAR),
]
BLOCK = [
    Row("input_layernorm.weight", "mixer_norm.scale", VECTOR),
    Row("post_attention_layernorm.weight", "mlp_norm.scale", VECTOR),
    *MLP,
]
KEY_VALUE = [
    Row("self_attn.k_proj.weight", "mixer.inputs.key", LINEAR),
    Row("self_attn.v_proj.weight", "mixer.inputs.value", LINEAR),
    Row("self_attn.o_proj.weight", "mixer.output", FROM_HEADS),
    Row("self_attn.q_norm.weight", "mixer.inputs.query_norm.scale", VECTOR),
    Row("self_attn.k_norm.weight", "mixer.inputs.key_norm.scale", VECTOR),
]
ATTENTION = [
    Row("self_attn.q_proj.weight", "mixer.inputs.query", LINEAR),
    Row("self_attn.q_proj.bias", "mixer.inputs.query_bias", VECTOR),
    Row("self_attn.k_proj.bias", "mixer.inputs.key_bias", VECTOR),
    Row("self_attn.v_proj.bias", "mixer.inputs.value_bias", VECTOR),
    *KEY_VALUE,
]
# The query's kernel holds, head by head, the query and the output gate.
GATED_ATTENTION = [
    Row("self_attn.q_proj.weight", ("mixer.inputs.query", "mixer.output_gate.kernel"), LINEAR, by_head=True),
    *KEY_VALUE,
]
DECAY = [
    Row("linear_attn.A_log", "mixer.decay.log_rate", VECTOR),
    Row("linear_attn.dt_bias", "mixer.decay.bias", VECTOR),
]
QUERY_KEY_VALUE = ("mixer.inputs.query", "mixer.inputs.key", "mixer.inputs.value")
CONVOLUTIONS = tuple(f"mixer.inputs.convolutions.{n}.weight" for n in range(3))
QWEN_DELTA = [
    Row("linear_attn.in_proj_qkv.weight", QUERY_KEY_VALUE, LINEAR),
    Row("linear_attn.conv1d.weight", CONVOLUTIONS, CONVOLUTION),
    Row("linear_attn.in_proj_z.weight", "mixer.output.gate", LINEAR),
    Row("linear_attn.in_proj_b.weight", "mixer.beta.kernel", LINEAR),
    Row("linear_attn.in_proj_a.weight", "mixer.decay.kernel", LINEAR),
    *DECAY,
    Row("linear_attn.norm.weight", "mixer.output.norm.norm.scale", VECTOR),
    Row("linear_attn.out_proj.weight", "mixer.output.output", FROM_HEADS),
]
OLMO_DELTA = [
    Row("attention_layer_norm.weight|input_layernorm.weight", "mixer_norm.scale", VECTOR),
    Row("feedforward_layer_norm.weight|post_attention_layernorm.weight", "mlp_norm.scale", VECTOR),
    *MLP,
    Row("linear_attn.q_proj.weight", "mixer.inputs.query", LINEAR),
    Row("linear_attn.k_proj.weight", "mixer.inputs.key", LINEAR),
    Row("linear_attn.v_proj.weight", "mixer.inputs.value", LINEAR),
    # transformers 5.24 saves the rows of the three in thirds: they are laid end to end and cut anew.
    Row(tuple(f"linear_attn.{name}_conv1d.weight" for name in "qkv"), CONVOLUTIONS, CONVOLUTION),
    Row("linear_attn.g_proj.weight", "mixer.output.gate", LINEAR),
    Row("linear_attn.b_proj.weight", "mixer.beta.kernel", LINEAR),
    Row("linear_attn.a_proj.weight", "mixer.decay.kernel", LINEAR),
    *DECAY,
    Row("linear_attn.o_norm.weight", "mixer.output.norm.norm.scale", VECTOR),
    Row("linear_attn.o_proj.weight", "mixer.output.output", FROM_HEADS),
]
OLMO_ATTENTION = [
    # transformers 5.24 writes the first of these under another name.
    Row("post_attention_layernorm.weight|feedforward_layer_norm.weight", "mixer_norm.scale", VECTOR),
    Row("post_feedforward_layernorm.weight", "mlp_norm.scale", VECTOR),
    *MLP,
    *ATTENTION,
]


def _common(fields: Fields, kv_heads: int | None = None) -> dict[str, Any]:
    """The fields of ModelConfig that all have. kv_heads: what an absent num_key_value_heads stands for, if it is not
    num_attention_heads."""
    heads = fields.take("num_attention_heads")
    fields.only("hidden_act", "silu", "swish")
    fields.only("mlp_bias", False)
    return dict(
        d_model=fields.take("hidden_size"),
        num_layers=fields.take("num_hidden_layers"),
        vocab_size=fields.take("vocab_size"),
        mlp_dim=fields.take("intermediate_size"),
        norm_epsilon=fields.take("rms_norm_eps", 1e-6),
        tie_embeddings=fields.take("tie_word_embeddings", False),
        embedding_scale="one",
        num_heads=heads,
        num_kv_heads=fields.take(
            "num_key_value_heads", heads if fields.has("num_key_value_heads") else kv_heads or heads
        ),
    )


def _say_common(config: ModelConfig, attention: Mixer) -> dict[str, Any]:
    heads, kv_heads, width = (setting(config, attention, n) for n in ("num_heads", "num_kv_heads", "head_dim"))
    return dict(
        hidden_size=config.d_model,
        num_hidden_layers=config.num_layers,
        vocab_size=config.vocab_size,
        intermediate_size=feed_forward_width(config, config.mixers[0]),
        rms_norm_eps=config.norm_epsilon,
        tie_word_embeddings=config.tie_embeddings,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=width,
        hidden_act="silu",
    )


def _rope(fields: Fields, text_only: str = "", part: float | None = None) -> dict[str, Any]:
    """{base, fraction} of the rotary embedding, by the names of transformers 5 or of before.

    text_only: names in rope_parameters that have no effect on a text's positions. part: the fraction that is rotated if
    no field says it; None: the class rotates whole heads, and knows no fraction.
    """
    known = f"rope_type type rope_theta partial_rotary_factor {FIELDS}"
    given = fields.take_object("rope_parameters", f"{known} {text_only}")
    before = fields.take_object("rope_scaling", f"rope_type type {FIELDS}")
    found = [read_scaling(fields, "rope_parameters", given), read_scaling(fields, "rope_scaling", before)]
    scalings = [scaling for scaling in found if scaling != "none"]
    if len(scalings) > 1:
        fields.refuse(f"rope_scaling = {before!r}: rope_parameters has a scaling too")
    base = given.get("rope_theta", fields.take("rope_theta", 10_000.0))
    fraction = given.get("partial_rotary_factor", fields.take("partial_rotary_factor", part or 1.0))
    if part is None and fraction != 1:
        fields.refuse(f"partial_rotary_factor = {fraction!r}: this model type rotates whole heads; only 1 fits")
    scaled = dict(rope_scaling=scalings[0]) if scalings else {}
    return dict(rope_base=float(base)) | ({} if fraction == 1 else dict(rotary_fraction=float(fraction))) | scaled


def _say_rope(config: ModelConfig, attention: Mixer) -> dict[str, Any] | None:
    base, fraction = setting(config, attention, "rope_base"), setting(config, attention, "rotary_fraction")
    said = say_scaling(setting(config, attention, "rope_scaling")) | dict(rope_theta=base)
    return said if fraction == 1 else said | dict(partial_rotary_factor=fraction)


def _window(fields: Fields) -> dict[str, Any]:
    window = fields.take("sliding_window", None)
    fields.take("max_window_layers", None)
    if fields.take("use_sliding_window", False) and window:
        fields.refuse("use_sliding_window = True: windows in some layers have no equivalent here")
    return {}


def _read_llama(fields: Fields) -> ModelConfig:
    common = _common(fields)
    fields.divides("num_attention_heads", "hidden_size")  # its class wants that, whatever head_dim is
    own = dict(head_dim=fields.take("head_dim", common["d_model"] // common["num_heads"]), **_rope(fields))
    if fields.take("attention_bias", False):
        fields.refuse("attention_bias = True: a bias of the output projection has no equivalent here")
    fields.finish()
    return ModelConfig(mixers=("softmax_attention",), **common, **own)


def _say_llama(config: ModelConfig) -> dict[str, Any]:
    one = layers(config)[0]
    return _say_common(config, one) | dict(rope_parameters=_say_rope(config, one), attention_bias=False, mlp_bias=False)


def _read_qwen3(fields: Fields) -> ModelConfig:
    common = _common(fields, 32)
    own = dict(head_dim=fields.take("head_dim", 128), qk_norm=True, **_rope(fields), **_window(fields))
    fields.only("attention_bias", False)
    if set(fields.take("layer_types", [])) - {"full_attention"}:
        fields.refuse("layer_types: only 'full_attention' has an equivalent here")
    fields.finish()
    return ModelConfig(mixers=("softmax_attention",), **common, **own)


def _say_qwen3(config: ModelConfig) -> dict[str, Any]:
    one = layers(config)[0]
    return _say_common(config, one) | dict(rope_parameters=_say_rope(config, one), attention_bias=False)


def _usual_types(count: int, interval: int) -> list[str]:
    """layer_types if the field is absent: each layer of number `interval`, 2 * `interval`, ... is full attention."""
    return ["linear_attention" if n % interval else "full_attention" for n in range(1, count + 1)]


def _by_type(fields: Fields, count: int, kinds: dict[str, Mixer], usual: list[str]) -> list[Mixer]:
    """The mixer of each layer, from layer_types, or `usual` if it is absent."""
    types = fields.take("layer_types", usual)
    if len(types) != count or set(types) - set(kinds):
        fields.refuse(f"layer_types = {types!r}: must name {' or '.join(kinds)} for each of {count} layers")
        types = [next(iter(kinds))] * count
    return [kinds[kind] for kind in types]


def _delta(fields: Fields, heads: int, value_heads: int, width: int, value_width: int, **own: Any) -> Mixer:
    """A layer of the gated delta rule, from the fields named linear_*; with what they are if absent."""
    return Mixer(
        "gated_delta_net",
        num_heads=fields.take("linear_num_key_heads", heads),
        num_value_heads=fields.take("linear_num_value_heads", value_heads),
        head_dim=fields.take("linear_key_head_dim", width),
        value_dim=fields.take("linear_value_head_dim", value_width),
        conv_size=fields.take("linear_conv_kernel_dim", 4),
        beta_bias=False,
        **own,
    )


def _say_delta(config: ModelConfig) -> dict[str, Any]:
    every = layers(config)
    types = ["linear_attention" if m.name == "gated_delta_net" else "full_attention" for m in every]
    one = next((mixer for mixer in every if mixer.name == "gated_delta_net"), None)
    if one is None:
        return dict(layer_types=types)
    get = lambda name: setting(config, one, name)
    return dict(
        layer_types=types,
        linear_num_key_heads=get("num_heads"),
        linear_num_value_heads=get("num_value_heads") or get("num_heads"),
        linear_key_head_dim=get("head_dim"),
        linear_value_head_dim=get("value_dim") or get("head_dim"),
        linear_conv_kernel_dim=4 if get("conv_size") < 0 else get("conv_size"),
    )


def _attention_of(config: ModelConfig) -> Mixer:
    every = layers(config)
    return next((mixer for mixer in every if mixer.name == "softmax_attention"), every[0])


def _read_qwen3_5(fields: Fields) -> ModelConfig:
    common = _common(fields, 4)
    heads = dict(num_heads=common.pop("num_heads"), num_kv_heads=common.pop("num_kv_heads"))
    attention = Mixer(
        "softmax_attention",
        head_dim=fields.take("head_dim", 256),
        qk_norm=True,
        output_gate="on",
        **heads,
        **_rope(fields, "mrope_section mrope_interleaved", 0.25),
    )
    fields.only("attention_bias", False)
    fields.only("attn_output_gate", True)
    fields.only("output_gate_type", "swish", "silu")  # of the delta rule; that of attention is a sigmoid
    fields.only("mamba_ssm_dtype", "float32")  # of the state
    kinds = {"linear_attention": _delta(fields, 16, 32, 128, 128), "full_attention": attention}
    usual = _usual_types(common["num_layers"], fields.take("full_attention_interval", 4))
    entries = _by_type(fields, common["num_layers"], kinds, usual)
    fields.finish()
    return ModelConfig(mixers=pattern(entries), norm_gain="one_plus_scale", **common)


def _say_qwen3_5(config: ModelConfig) -> dict[str, Any]:
    one = _attention_of(config)
    # An absent fraction stands for a quarter.
    rope = dict(partial_rotary_factor=setting(config, one, "rotary_fraction")) | _say_rope(config, one)
    return _say_common(config, one) | _say_delta(config) | dict(rope_parameters=rope)


def _rope_or_none(fields: Fields) -> dict[str, Any]:
    """As `_rope`, where a rope_theta that is null within rope_parameters, or rope_parameters that are null and no field
    of before, say that there is no rotary embedding."""
    given = fields.take("rope_parameters", None)
    if isinstance(given, dict) and given.get("rope_theta", 1) is None:
        fields.take_object("rope_parameters", "rope_type type rope_theta")
        return dict(rope_base=0.0)
    before = [name for name in ("rope_theta", "rope_scaling") if fields.take(name, None)]
    if given is None and fields.has("rope_parameters") and not before:
        return dict(rope_base=0.0)
    return _rope(fields)


def _read_olmo_hybrid(fields: Fields) -> ModelConfig:
    common = _common(fields)
    heads = dict(num_heads=common.pop("num_heads"), num_kv_heads=common.pop("num_kv_heads"))
    fields.only("attention_bias", False)
    attention = Mixer(
        "softmax_attention",
        head_dim=fields.take("head_dim", common["d_model"] // heads["num_heads"]),
        qk_norm=True,
        qk_norm_over="all_heads",
        norm_placement="post",
        **heads,
        **_rope_or_none(fields),
    )
    every = heads["num_heads"]
    width = int(0.75 * common["d_model"] / fields.take("linear_num_key_heads", every))
    delta = _delta(
        fields,
        every,
        every,
        width,
        2 * fields.take("linear_key_head_dim", width),
        negative_eigenvalues=fields.take("linear_allow_neg_eigval", True),
        output_norm_epsilon=1e-5,  # whatever rms_norm_eps is
    )
    kinds = {"linear_attention": delta, "full_attention": attention}
    usual = _usual_types(common["num_layers"], 4)
    usual = usual if "full_attention" in usual else [*usual[:-1], "full_attention"]
    entries = _by_type(fields, common["num_layers"], kinds, usual)
    if not {attention, delta} <= {*entries}:
        fields.refuse("layer_types: its class needs both linear_attention and full_attention")
    fields.finish()
    return ModelConfig(mixers=pattern(entries), **common)


def _say_olmo_hybrid(config: ModelConfig) -> dict[str, Any]:
    every = layers(config)
    delta = next(mixer for mixer in every if mixer.name == "gated_delta_net")
    attention = _attention_of(config)
    said = _say_common(config, attention) | _say_delta(config)
    # transformers 5.24 reads rope_parameters that are null as its default rotary embedding.
    none = dict(rope_type="default", rope_theta=None)
    rope = _say_rope(config, attention) if setting(config, attention, "rope_base") else none
    return said | dict(rope_parameters=rope, linear_allow_neg_eigval=setting(config, delta, "negative_eigenvalues"))


_OLMO_IGNORED = "linear_a_log_max linear_a_log_min linear_dt_init_floor linear_dt_max linear_dt_min"

SOURCES = [
    Source("llama", "LlamaForCausalLM", _read_llama, _say_llama, {"softmax_attention": BLOCK + ATTENTION}, OUTSIDE),
    Source("qwen3", "Qwen3ForCausalLM", _read_qwen3, _say_qwen3, {"softmax_attention": BLOCK + ATTENTION}, OUTSIDE),
    Source(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        _read_qwen3_5,
        _say_qwen3_5,
        {"gated_delta_net": BLOCK + QWEN_DELTA, "softmax_attention": BLOCK + GATED_ATTENTION},
        OUTSIDE,
        # The tensors of its multi-token prediction are not read.
        "mlp_only_layers mtp_num_hidden_layers mtp_use_dedicated_embeddings",
    ),
    Source(
        "olmo_hybrid",
        "OlmoHybridForCausalLM",
        _read_olmo_hybrid,
        _say_olmo_hybrid,
        {"gated_delta_net": OLMO_DELTA, "softmax_attention": OLMO_ATTENTION},
        OUTSIDE,
        _OLMO_IGNORED,
    ),
]
