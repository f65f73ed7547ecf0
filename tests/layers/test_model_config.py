"""What a configuration means, what it costs, and what it is told when it doesn't hold together."""

import dataclasses
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.model_cases import MODELS, SMALL, VOCABULARY, make_model
from test_layers_flops import convolution_flops, counted_per_token

from deltaformer_jax import Round
from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.config.files import packaged_config
from deltaformer_jax.layers.feed_forward.sizes import hidden_width
from deltaformer_jax.layers.mixers.build import mixer_fields
from deltaformer_jax.model import LanguageModel, num_parameters, parameters_of_a_token


def test_overrides_reach_their_mixer_only():
    model = make_model(
        window=5, num_layers=3, mixers=("softmax_attention", Mixer("softmax_attention", window=2), "retention")
    )
    assert [getattr(block.mixer, "window", None) for block in model.blocks] == [5, 2, None]
    wide = make_model(num_layers=2, mixers=("delta_former", Mixer("delta_former", head_dim=8, write_scale=0.5)))
    assert [block.mixer.head_dim for block in wide.blocks] == [4, 8]
    assert [block.mixer.write_scale for block in wide.blocks] == [0.5, 0.5]


def test_zero_means_the_mixers_own_choice():
    mixer = make_model(mixers=("delta_former",), write_similarity="linear", implementation="").blocks[0].mixer
    assert mixer.write_scale == 1 / 4 and mixer.read_scale == 4**-0.5  # of keys of length √4
    assert mixer.chunk_size is None and mixer.implementation is None
    assert make_model(mixers=("delta_former",), rope_base=0.0).blocks[0].mixer.inputs.rope_base is None


@pytest.mark.parametrize(
    "mixer, same",
    [
        (Mixer("gated_delta_net", conv_size=None, output_gate=None), dict(conv_size=0, output_gate="off")),
        (Mixer("gated_delta_net", value_dim=None), dict(value_dim=0)),
        (Mixer("softmax_attention", rope_base=None, window=None), dict(rope_base=0.0)),
        (Mixer("delta_former", write_similarity=Round(decimals=2)), dict(write_similarity="round")),
        (Mixer("delta_former", num_heads=np.int64(4), rope_base=np.float32(100)), dict(num_heads=4, rope_base=100.0)),
    ],
    ids=lambda x: x.name if isinstance(x, Mixer) else None,
)
def test_other_ways_to_say_it(mixer, same):
    """None is "without" where there is such a thing; objects and NumPy's numbers do where no program keeps them."""
    one, other = (
        jax.eval_shape(lambda mixer=mixer, fields=fields: make_model(num_layers=1, mixers=(mixer,), **fields))
        for mixer, fields in ((mixer, {}), (mixer.name, same))
    )
    assert jax.tree.map(lambda x: x.shape, nnx.to_pure_dict(nnx.state(one))) == jax.tree.map(
        lambda x: x.shape, nnx.to_pure_dict(nnx.state(other))
    )
    for field in same.keys() & vars(one.blocks[0].mixer).keys():
        assert getattr(one.blocks[0].mixer, field) == getattr(other.blocks[0].mixer, field)
    assert ModelConfig(rope_base=None, conv_size=None, window=None) == ModelConfig(rope_base=0.0, conv_size=0)


def test_mlp_dim():
    assert hidden_width(0, 256, "swiglu") == 704  # 682.7, up to a multiple of 64
    assert hidden_width(0, 24, "geglu") == 64 and hidden_width(100, 24, "geglu") == 100
    assert hidden_width(0, 256, "relu2") == 1024 and hidden_width(100, 256, "memory") == 100


# The memories have no parallel form: test_layers_memory.py counts theirs.
ATTENTION = {name: fields for name, fields in MODELS.items() if name != "memories"}


@pytest.mark.parametrize("fields", ATTENTION.values(), ids=ATTENTION)
def test_flops_are_those_of_the_parallel_form(fields):
    model = make_model(**fields | dict(implementation="parallel"))
    windowed = model.blocks[-1].mixer if fields == {} else None
    if windowed is not None:  # the parallel form computes the whole square and masks it
        windowed.window = None

    def trace(length):
        return jax.make_jaxpr(lambda tokens: model(tokens)[0])(jnp.zeros((1, length), jnp.int32)).jaxpr

    counted = counted_per_token(trace, 10)
    counted += convolution_flops(model)
    counted -= 2 * 16 * (model.embedding.rows - VOCABULARY)  # the padded columns of the logits
    for block in model.blocks:
        if getattr(block.mixer, "tied", False):
            counted -= model.periods * 2 * block.mixer.num_heads * block.mixer.head_dim * 10
    assert model.flops_per_token(10) == pytest.approx(counted, rel=1e-12)


def test_number_of_parameters():
    # A block: q and o 16·16 each, k and v 16·8 each, gate 16·2 + 2, feed-forward 3·16·24, two norms.
    block = 2 * 256 + 2 * 128 + 34 + 3 * 16 * 24 + 2 * 16
    model = make_model(mixers=("delta_former",), num_layers=2)
    assert num_parameters(model) == 2 * block + 128 * 16 + 16
    untied = make_model(mixers=("delta_former",), num_layers=2, tie_embeddings=False)
    assert num_parameters(untied) == num_parameters(model) + 128 * 16


def test_fields_a_mixer_may_override():
    assert "window" in mixer_fields("softmax_attention") and "window" not in mixer_fields("retention")
    assert {"write_query", "beta", "num_heads", "kv_shift"} <= set(mixer_fields("delta_former"))
    assert not {"d_model", "num_layers", "compute_dtype"} & set(mixer_fields("delta_former"))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(vocab_size=0), "model.vocab_size = 0: must be at least 1"),
        (dict(d_model=0), "model.d_model = 0: must be at least 1"),
        (dict(num_layers=3), "model.num_layers = 3: must be a multiple of the length of model.mixers, 2"),
        (dict(mlp_dim=-1), "model.mlp_dim = -1: must be at least 0"),
        (dict(norm_epsilon=0.0), "model.norm_epsilon = 0.0: must be above 0"),
        (dict(num_heads=3), "model.num_heads=3 must be a multiple of num_kv_heads=2"),
        (dict(head_dim=5), "model.head_dim=5 must be even for the rotary embedding"),
        (
            dict(compute_dtype="bf16"),
            "model.compute_dtype = 'bf16': must be one of .*; did you mean bfloat16",
        ),
        (dict(remat="all"), "model.remat = 'all': must be one of none, operands, products, kernels, block, auto"),
        (dict(mixers=()), r"model.mixers = \(\): must be a tuple"),
        (dict(mixers="delta_former"), "model.mixers = 'delta_former': must be a tuple"),
        (dict(mixers=(3,)), r"model.mixers = \(3,\): must be a tuple of names or Mixer"),
        (dict(mixers=("deltaformer",)), "model.mixers: 'deltaformer' is not one of .*; did you mean delta_former"),
        (dict(mixers=(Mixer("softmax_attention", windw=3),)), "override of softmax_attention: 'windw'.*'window'"),
        (dict(mixers=(Mixer("retention", window=3),)), "an override of retention: 'window' is not one of"),
        (dict(mixers=(Mixer("delta_former", num_heads=5),)), r"model.num_heads=5 .* \(of Mixer\(name='delta_former'"),
        (dict(mixers=("retention",), window=4), "model.window = 4: no mixer"),
        (dict(mixers=("delta_former",), forget_gate=True), "model.forget_gate = True: no mixer in .*former"),
        (dict(mixers=("delta_net",), kv_shift=True), "model.kv_shift = True: no mixer"),
        (dict(kv_shift_window=3), "model.kv_shift_window=3 needs kv_shift=True"),
        (dict(kv_shift_parts="key"), "model.kv_shift_parts='key' needs kv_shift=True"),
        (dict(kv_shift=True, kv_shift_window=1), "model.kv_shift_window = 1: must be at least 2"),
        (dict(kv_shift=True, kv_shift_parts="k"), "model.kv_shift_parts = 'k': must be one of both, key, value"),
        (dict(mixers=("softmax_attention",), write_similarity="round"), "model.write_similarity = 'round': no mixer"),
        (dict(implementation="chunks"), "model.implementation = 'chunks': must be one of .*; did you mean chunked"),
        (dict(window=-1), r"model.window = -1: must be at least 1 \(0 leaves it to the mixer\)"),
        (
            dict(write_query="keys"),
            "model.write_query = 'keys': must be one of key, query, projected; did you mean key",
        ),
        (dict(write_similarity="cosine"), "model.write_similarity='cosine'"),
        (dict(beta="sigmod"), "model.beta = 'sigmod': must be one of .*; did you mean sigmoid"),
        (dict(alpha="on"), "model.alpha = 'on': must be one of off, sigmoid"),
        (dict(rope_base=-2.0), "model.rope_base = -2.0: must be above 1"),
    ],
)
def test_errors_name_the_field(fields, message):
    fields = SMALL | dict(mixers=("softmax_attention", "delta_former")) | fields
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: LanguageModel(ModelConfig(**fields), rngs=nnx.Rngs(0)))


CONFIG_FILES = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(CONFIG_FILES.rglob("*_340m.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_340m_configs_have_340m_parameters(path):
    """To within 2.5 million, whatever the mixer, and nothing but the model differs between them."""
    both = (path, CONFIG_FILES / "transformer_340m.py")
    config, transformer = (runpy.run_path(str(each))["get_config"]() for each in both)
    shapes = jax.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
    assert abs(num_parameters(shapes) - 341e6) < 2.5e6
    assert (config.data, config.optimizer, config.run) == (transformer.data, transformer.optimizer, transformer.run)


@pytest.mark.parametrize("similarity", ["linear", "relu", "round"])
def test_the_configs_of_other_similarities_change_nothing_else(similarity):
    config = packaged_config(f"similarities/deltaformer_{similarity}_340m")
    config.model.write_similarity = "softmax"
    assert config == packaged_config("deltaformer_340m")


def test_the_small_configs_with_experts_have_the_sizes_that_they_state():
    ours, control = (packaged_config(f"experts/{name}_moe_small") for name in ("deltaformer", "transformer"))
    for config in (ours, control):
        model = dataclasses.replace(config.model, vocab_size=257)
        shapes = jax.eval_shape(lambda model=model: LanguageModel(model, rngs=nnx.Rngs(0)))
        assert round(num_parameters(shapes) / 1e6) == 41 and round(parameters_of_a_token(shapes) / 1e6) == 13
        experts = num_parameters(shapes.blocks[0].mlp.experts)
        assert parameters_of_a_token(shapes) == num_parameters(shapes) - experts * 6 // 8
    ours.model.mixers = control.model.mixers
    assert ours == control


def test_the_1b3_config_has_the_size_that_it_states():
    path = CONFIG_FILES / "deltaformer_1b3.py"
    config, page = runpy.run_path(str(path))["get_config"](), path.read_text(encoding="utf-8")
    model = jax.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
    parameters, flops = num_parameters(model), 3 * model.flops_per_token(config.data.sequence_length)
    tokens = config.run.steps * config.data.batch_size * config.data.sequence_length
    assert f"DeltaFormer, {parameters / 1e9:.2f} billion parameters" in page and config.model.head_dim == 128
    work = f"{tokens / 1e9:.0f}e9 tokens at {flops / 1e9:.2f} GFLOP each, attention included, are {tokens * flops:.1e}"
    assert work.replace("e+", "e") in page
