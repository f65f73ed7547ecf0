"""What a field that is absent from another project's config.json stands for: the default of its class.

Read from transformers 5.24.0 and flash-linear-attention 0.6.0.
"""

import dataclasses

import pytest

from deltaformer_jax.config.rope_scaling import parse
from deltaformer_jax.interop.fields import Fields
from deltaformer_jax.interop.sources import SOURCES
from deltaformer_jax.interop.sources.base import layers
from deltaformer_jax.interop.sources.single_layers import LAYERS
from deltaformer_jax.layers.mixers.build import resolved_fields
from deltaformer_jax.layers.mixers.feed_forward import feed_forward_width

HF = dict(vocab_size=64, hidden_size=128, num_hidden_layers=4, intermediate_size=80, num_attention_heads=4)
FLA = dict(vocab_size=64, hidden_size=128, num_hidden_layers=2, num_heads=4)
EVERY = ["gated_delta_net"] * 3 + ["softmax_attention"]


def read(kind, **values):
    return SOURCES[kind].read(Fields(values, SOURCES[kind].ignored))


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("llama", HF, dict(num_kv_heads=4, head_dim=32, rope_base=1e4, rotary_fraction=1, qk_norm=False)),
        ("llama", HF | dict(rope_parameters={"rope_type": "default"}, rope_theta=5e5), dict(rope_base=5e5)),
        ("llama", HF | dict(rope_scaling={"type": "linear", "factor": 2.0}), dict(rope_scaling="linear:2.0")),
        (
            "llama",
            HF | dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}, max_position_embeddings=64),
            dict(rope_scaling="yarn:2.0,64"),
        ),
        ("qwen3", HF | dict(num_attention_heads=64), dict(num_kv_heads=32, head_dim=128, rope_base=1e4)),
        ("qwen3", HF | dict(num_key_value_heads=None), dict(num_kv_heads=4)),
        ("qwen3_5_text", HF, dict(num_kv_heads=4, head_dim=256, rope_base=1e4, rotary_fraction=0.25)),
        ("qwen3_5_text", HF | dict(rope_parameters={"rope_theta": 1e7}), dict(rope_base=1e7, rotary_fraction=0.25)),
        ("qwen3_5_text", HF | dict(partial_rotary_factor=0.5), dict(rotary_fraction=0.5)),
        ("olmo_hybrid", HF | dict(rope_parameters=None), dict(num_kv_heads=4, head_dim=32, rope_base=None)),
        ("olmo_hybrid", HF, dict(rope_base=1e4)),
        ("olmo_hybrid", HF | dict(rope_parameters={"rope_theta": 5e5}), dict(rope_base=5e5)),
        ("olmo_hybrid", HF | dict(rope_parameters={"rope_theta": None}), dict(rope_base=None)),
        ("olmo_hybrid", HF | dict(rope_parameters=None, rope_theta=5e5), dict(rope_base=5e5)),
        ("transformer", FLA, dict(num_kv_heads=4, rope_base=1e4, window=None, qk_norm=False, qkv_bias=False)),
        ("forgetting_transformer", FLA, dict(num_kv_heads=4, output_gate=False, forget_gate=True)),
        ("deltaformer", FLA, dict(num_kv_heads=4, head_dim=32, rope_base=1e4)),
    ],
)
def test_absent_fields_of_attention(kind, given, expected):
    config = read(kind, **given)
    found = resolved_fields(config, layers(config)[-1])
    assert {name: found[name] for name in expected} == expected
    assert config.norm_epsilon == 1e-6 and not config.tie_embeddings


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("qwen3_5_text", HF, dict(num_heads=16, num_value_heads=32, head_dim=128, value_dim=128, conv_size=4)),
        # 0.75 * 128 / 4 features of a key, twice as many of a value.
        ("olmo_hybrid", HF, dict(num_heads=4, num_value_heads=4, head_dim=24, value_dim=48, negative_eigenvalues=True)),
        ("olmo_hybrid", HF | dict(linear_num_key_heads=2), dict(num_heads=2, num_value_heads=4, head_dim=48)),
        ("olmo_hybrid", HF | dict(linear_key_head_dim=8), dict(head_dim=8, value_dim=16)),
        ("delta_net", FLA, dict(head_dim=32, value_dim=32, output_gate=False, conv_size=4)),
        ("gated_deltanet", FLA, dict(head_dim=256, value_dim=512, num_value_heads=4, output_gate=True)),
        ("kda", FLA, dict(head_dim=128, value_dim=128, gate_rank=128, decay_lower_bound=0.0)),
        ("kda", FLA | dict(lower_bound=-6.0), dict(decay_lower_bound=-6.0)),
        ("gla", FLA, dict(head_dim=16, value_dim=32, output_gate=True)),
        ("retnet", FLA, dict(head_dim=32, value_dim=64, output_gate=True)),
    ],
)
def test_absent_fields_of_memories(kind, given, expected):
    config = read(kind, **given)
    found = resolved_fields(config, layers(config)[0])
    assert {name: found[name] for name in expected} == expected


def test_absent_fields_of_single_layers():
    sizes = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    of = lambda kind, **given: dict(LAYERS[kind](sizes | given, 1).mixer.overrides)
    full = of("qwen3_next", layer_types=["linear_attention", "full_attention"])
    assert (full["rope_base"], full["rotary_fraction"], full["norm_epsilon"]) == (1e4, 0.25, 1e-6)
    both = of(
        "qwen3_next", layer_types=["x", "full_attention"], rope_theta=1e7, rope_parameters={"rope_type": "default"}
    )
    assert both["rope_base"] == 1e7
    with pytest.raises(ValueError, match="rope_type = 'yarn': only 'default' has"):
        of("qwen3_next", layer_types=["x", "full_attention"], rope_scaling={"type": "yarn", "factor": 4.0})
    found = of("bailing_hybrid")
    assert (found["norm_epsilon"], found["decay_lower_bound"], found["head_dim"]) == (1e-6, -5, 16)
    found = of("kimi_linear", layer_types=["linear_attention"] * 2, linear_num_heads=4, linear_head_dim=8)
    assert (found["norm_epsilon"], found["conv_size"]) == (1e-5, 4)


def test_absent_layer_types_and_feed_forward_widths():
    names = lambda kind, **fields: [mixer.name for mixer in layers(read(kind, **HF | fields))]
    assert names("qwen3_5_text") == names("qwen3_5_text", layer_types=None) == names("olmo_hybrid") == EVERY
    assert names("qwen3_5_text", layer_types=None, full_attention_interval=2) == [EVERY[0], EVERY[3]] * 2
    assert names("olmo_hybrid", num_hidden_layers=2) == EVERY[2:]  # at least one is full attention
    # The width is a multiple of 256 from two thirds of hidden_ratio, which null sets to 4.
    width = lambda config: feed_forward_width(config, config.mixers[0])
    widths = [width(read("retnet", **FLA | dict(hidden_size=512) | more)) for more in ({}, {"hidden_ratio": None})]
    assert widths == [768, 1536]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("llama", dict(HF, partial_rotary_factor=0.5), "partial_rotary_factor = 0.5: this model type rotates whole"),
        ("kda", dict(FLA, safe_gate=True), "lower_bound = None: give a number below 0; safe_gate needs one"),
        ("gated_deltanet", dict(FLA, expand_v=1.03), r"expand_v = 1\.03: 256 \* 1\.03 = 263\.68 is no whole number"),
        ("gla", dict(FLA, hidden_size=100), r"expand_k = 0\.5: 100 \* 0\.5 = 50 is no .* for each of 4 heads"),
        ("qwen3_5_text", dict(HF, full_attention_interval=0), "full_attention_interval = 0: give a whole number above"),
    ],
)
def test_values_with_which_its_class_fails_are_refused(kind, given, message):
    with pytest.raises(ValueError, match=message):
        read(kind, **given)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("scaling", ["none", "linear:4.0", "yarn:4.0,64", "llama3:8.0,1.0,4.0,64"])
def test_a_scaled_rotary_embedding_there_and_back(kind, scaling):
    config = read(kind, **HF)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    said = SOURCES[kind].write(scaled)
    assert said["rope_parameters"]["rope_type"] == scaling.partition(":")[0].replace("none", "default")
    assert parse(read(kind, **said).rope_scaling) == parse(scaling)
