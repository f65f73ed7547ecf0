"""A folder that comes back as it was: its model type and names; and what is said where that cannot be."""

import dataclasses
import inspect
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deltaformer_jax import Mixer, ModelConfig
from deltaformer_jax.config import Config, DataConfig, RunConfig
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.interop import compare, load_pretrained, save_pretrained
from deltaformer_jax.interop.fields import Fields
from deltaformer_jax.interop.kept import kept_of_run, read_kept
from deltaformer_jax.interop.save import choose
from deltaformer_jax.interop.sources import SOURCES
from deltaformer_jax.layers.mixers import MIXERS
from deltaformer_jax.layers.mixers.feed_forward import OF_THE_LOSS, READ_BY

PRETRAINED = Path(__file__).parents[1] / "fixtures" / "pretrained"


def test_a_model_that_two_types_can_say_keeps_its_own(tmp_path):
    """fla's transformer with default settings, which llama can say too; its tied table is there twice."""
    folder = tmp_path / "in"
    shutil.copytree(PRETRAINED / "fla_transformer", folder)
    said = json.loads((folder / "config.json").read_text()) | dict(qk_norm=False, window_size=None)
    (folder / "config.json").write_text(json.dumps(said | dict(tie_word_embeddings=True)))
    tensors = {
        n: x for n, x in load_file(folder / "model.safetensors").items() if "q_norm" not in n and "k_norm" not in n
    }
    tensors["lm_head.weight"] = tensors["model.embeddings.weight"]
    save_file(tensors, folder / "model.safetensors")
    model, config = load_pretrained(folder)
    assert config.tie_embeddings and read_kept(folder)["tied_head"]
    assert save_pretrained(model, config, tmp_path / "out", kept=read_kept(folder)) == "transformer"
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert set(back) == set(tensors) and all(np.array_equal(back[name], tensors[name]) for name in tensors)
    assert save_pretrained(model, config, tmp_path / "other", model_type="llama", kept=read_kept(folder)) == "llama"
    assert save_pretrained(model, config, tmp_path / "none") == "llama"
    assert "lm_head.weight" not in load_file(tmp_path / "none" / "model.safetensors")


def test_why_a_model_is_written_as_our_own_type(tmp_path):
    sizes = dict(vocab_size=64, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, conv_size=4)
    sizes |= dict(embedding_scale="one", beta_bias=False, tie_embeddings=False)
    attention = Mixer("softmax_attention", conv_size=0, output_gate="off", qk_norm=True, qk_norm_epsilon=1e-5)
    hybrid = ModelConfig(**sizes, mixers=("delta_net", attention))
    source, _, why = choose(hybrid, None, "delta_net")
    assert source is None and "delta_net cannot say model.qk_norm = True" in why and "\n" not in why
    with pytest.raises(ValueError, match=r"delta_net cannot say model\.qk_norm = True"):
        choose(hybrid, "delta_net")
    *_, why = choose(ModelConfig(**sizes, mixers=("delta_net", "retention")), None)
    assert why == "no model type of another project has layers of delta_net, retention"
    newer = ModelConfig(**sizes | dict(num_layers=3), mixers=("gated_delta_net_2", "delta_product", "rwkv7"))
    *_, why = choose(newer, None)
    assert why == "no model type of another project has layers of delta_product, gated_delta_net_2, rwkv7"
    with pytest.raises(ValueError, match="gated_deltanet"):
        choose(newer, "gated_deltanet")
    assert choose(hybrid, None, "deltaformer_jax")[2] == choose(hybrid, "deltaformer_jax")[2] == ""


@pytest.mark.parametrize(
    ("kind", "base"), [("delta_net", "d_model"), ("kda", "head_dim"), ("gated_deltanet", "head_dim")]
)
def test_every_width_has_a_ratio_that_its_class_brings_back(kind, base):
    """expand_v is a quotient, and int(49 * (1 / 49)) is 0."""
    mixer = next(name for name in SOURCES[kind].rows if name != "softmax_attention")
    for width, value in ((49, 1), (49, 2), (98, 1), (103, 3), (107, 5), (161, 7), (187, 11)):
        config = ModelConfig(
            vocab_size=64, num_layers=1, num_heads=1, num_kv_heads=1, mixers=(mixer,), value_dim=value,
            **{"d_model": 98, "head_dim": 2} | {base: width},
        )  # fmt: skip
        said = SOURCES[kind].write(config)
        assert int(width * said["expand_v"]) == value
        assert SOURCES[kind].read(Fields(said, SOURCES[kind].ignored)).value_dim == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(shard_bytes="1GB"), "shard_bytes is a str; give a number of bytes above 0"),
        (dict(shard_bytes=0), "shard_bytes=0: give a number of bytes above 0"),
        (dict(kept={"bos_tokn_id": 1}), "kept: 'bos_tokn_id' is not one of .*; did you mean bos_token_id"),
        (dict(kept={"bos_token_id": "x"}), "kept: bos_token_id = 'x': give a whole number"),
        (dict(config=None), "config is a NoneType; give the ModelConfig"),
        (dict(model=ModelConfig(), config=object()), "model is a ModelConfig; give a LanguageModel"),
        (dict(folder=None), "folder is a NoneType; give the path"),
        (dict(folder="FILE"), "FILE is a file; give the path of a new folder"),
        (dict(folder="FILE/x"), "FILE is a file; give the path of a new folder"),
        (dict(tokenizer="FILE"), "holds no tokenizer; give a tokenizer.json, or None"),
        (dict(dtype=["float32"]), r"dtype is a list; give the dtype"),
        (dict(model_type=3), "model_type is a int; give a model type, or None"),
    ],
)
def test_arguments_of_another_kind_are_one_line(tmp_path, monkeypatch, llama, given, message):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("{}")
    arguments = dict(model=llama[0], config=llama[1], folder="out") | given
    with pytest.raises((ValueError, OSError), match=message) as error:
        save_pretrained(**arguments)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["FILE"]


@pytest.fixture(scope="module")
def llama():
    return load_pretrained(PRETRAINED / "hf_llama")


def test_a_tuned_run_has_the_positions_of_what_it_began_from(tmp_path):
    """The longer of its rows and those of a folder, of a run, or of a run that began from a folder."""

    def run(name, base, length):
        (tmp_path / name).mkdir()
        config = Config(run=RunConfig(init_from=base), data=DataConfig(sequence_length=length))
        Saved(config, "", "").write(tmp_path / name)
        return str(tmp_path / name)

    (tmp_path / "folder").mkdir()
    said = {"model_type": "qwen3_5", "text_config": {"max_position_embeddings": 4096}}  # of a multimodal model
    (tmp_path / "folder" / "config.json").write_text(json.dumps(said))
    tuned = run("tuned", str(tmp_path / "folder"), 256)
    positions = lambda workdir, length: kept_of_run(workdir, length)["max_position_embeddings"]
    assert positions(tuned, 256) == positions(run("again", tuned, 512), 512) == 4096
    assert positions(tuned, 8192) == 8192
    assert positions(run("alone", "", 128), 128) == positions(run("gone", str(tmp_path / "nowhere"), 128), 128) == 128


@pytest.mark.parametrize("kind", ["gla", "retnet"])
def test_the_norm_of_gla_and_retnet_has_the_name_that_its_class_gives_it(tmp_path, kind):
    """g_norm_swish_gate with a gate, unless fuse_norm is false; g_norm without one."""
    fixture = PRETRAINED / f"fla_{kind}"
    model, config = load_pretrained(fixture)
    names = lambda folder: {name.split(".")[-2] for name in load_file(folder / "model.safetensors") if "g_norm" in name}
    save_pretrained(model, config, tmp_path / "fused", kept=read_kept(fixture))
    assert names(tmp_path / "fused") == names(fixture) == {"g_norm_swish_gate"}

    apart = tmp_path / "apart"
    shutil.copytree(fixture, apart)
    tensors = load_file(apart / "model.safetensors")
    tensors = {name.replace("g_norm_swish_gate", "g_norm"): x for name, x in tensors.items()}
    save_file(tensors, apart / "model.safetensors")
    said = json.loads((apart / "config.json").read_text()) | dict(fuse_norm=False)
    (apart / "config.json").write_text(json.dumps(said))
    model, config = load_pretrained(apart)
    save_pretrained(model, config, tmp_path / "back", kept=read_kept(apart))
    assert set(load_file(tmp_path / "back" / "model.safetensors")) == set(tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["fuse_norm"] is False

    for name in [name for name in tensors if "attn.g_proj" in name]:
        del tensors[name]
    save_file(tensors, apart / "model.safetensors")
    (apart / "config.json").write_text(json.dumps(said | dict(use_output_gate=False, fuse_norm=True)))
    model, config = load_pretrained(apart)
    assert save_pretrained(model, config, tmp_path / "ungated") == kind
    assert names(tmp_path / "ungated") == {"g_norm"}


def test_models_that_their_classes_would_compute_otherwise_are_ours():
    """fla's models make no biases of convolutions, no grouped heads in DeltaFormer, no window of forget_gate."""
    some = dict(
        vocab_size=70, d_model=32, num_layers=2, embedding_scale="one", num_heads=2, num_kv_heads=2, head_dim=16
    )
    delta = dict(mixers=("delta_net",), value_dim=16, beta_bias=False, output_gate="on")
    source, _, why = choose(ModelConfig(**some, **delta, conv_bias=True), None)
    assert source is None and "delta_net cannot say model.conv_bias = True" in why
    forget = dict(mixers=("softmax_attention",), forget_gate=True, rope_base=0.0)
    assert choose(ModelConfig(**some, **forget), None)[0].model_type == "forgetting_transformer"
    grouped = dict(mixers=("delta_former",), write_query="query", beta="raw")
    assert choose(ModelConfig(**some, **grouped), None)[0].model_type == "deltaformer"
    source, _, why = choose(ModelConfig(**some | dict(num_kv_heads=1), **grouped), None)
    assert source is None and "deltaformer: num_kv_heads = 1: its class opens it, and then computes no" in why
    source, _, why = choose(ModelConfig(**some, **forget, window=4), None)
    assert source is None and "forgetting_transformer: config.json: window_size = 4: its class" in why


def test_a_qwen3_5_of_attention_alone_keeps_its_type():
    source = SOURCES["qwen3_5_text"]
    said = dict(hidden_size=32, num_hidden_layers=2, vocab_size=70, intermediate_size=24, num_attention_heads=2)
    said |= dict(num_key_value_heads=2, head_dim=16, layer_types=["full_attention"] * 2)
    assert choose(source.read(Fields(said, source.ignored)), None)[0] == source


def test_heads_of_a_width_that_classes_do_not_build_are_ours():
    some = dict(
        vocab_size=70, d_model=50, num_layers=2, embedding_scale="one", num_heads=3, num_kv_heads=3, head_dim=16
    )
    source, _, why = choose(ModelConfig(**some, mixers=("softmax_attention",)), None)
    assert source is None and "transformer: config.json: hidden_size = 50: must be a multiple of num_heads = 3" in why


LLAMA = dict(mixers=("softmax_attention",), embedding_scale="one", norm_epsilon=1e-5)


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({}, "llama"),
        ({"rope_scaling": "linear:4"}, "llama"),
        ({"rope_scaling": "yarn:4,2048"}, "llama"),
        ({"rope_scaling": "llama3:8,1,4,8192"}, "llama"),
        ({"rope_scaling": "ntk:4"}, None),
        ({"normalise_head": True}, None),
        ({"kv_shift": True, "kv_shift_window": 3}, None),
        ({"ffn_shift_rank": 2}, None),
        ({"read_similarity": "self_adjust"}, None),
        ({"initial_tokens": 1, "window": 2}, None),
        ({"separator_tokens": (1,), "window": 2}, None),
    ],
)
def test_what_llama_cannot_say_is_ours(fields, kind):
    source, _, why = choose(ModelConfig(vocab_size=32, **LLAMA | fields), None)
    assert (source and source.model_type) == kind
    assert kind or f"llama cannot say model.{next(iter(fields))} = " in why, why


def test_separators_are_named_where_a_type_has_the_window_but_not_them():
    """fla's transformer has a window; its deltaformer has none."""
    windowed = dict(vocab_size=32, head_dim=64, d_model=256, embedding_scale="one", window=8)
    softmax = ModelConfig(**windowed, mixers=("softmax_attention",))
    assert choose(softmax, "transformer")[0].model_type == "transformer"
    message = r"transformer cannot say model\.initial_tokens = 2, model\.separator_tokens = \(1, 2\)$"
    with pytest.raises(ValueError, match=message):
        choose(dataclasses.replace(softmax, initial_tokens=2, separator_tokens=(1, 2)), "transformer")
    with pytest.raises(ValueError, match=r"deltaformer cannot say model\.window = 8$"):
        choose(ModelConfig(**windowed, write_query="query", beta="raw"), "deltaformer")


def test_a_base_of_the_writes_own_is_compared_by_what_it_means():
    model = lambda **fields: ModelConfig(vocab_size=32, **fields)
    assert compare.differences(model(write_rope_base=0.0), model()) == ["model.write_rope_base = None"]
    assert compare.differences(model(rope_base=0.0, write_rope_base=1e4), model(write_rope_base=1e4)) == [
        "model.rope_base = None"
    ]
    same = [model(), model(write_rope_base=1e4)], [model(rope_base=0.0), model(rope_base=0.0, write_rope_base=0.0)]
    assert not any(compare.differences(one, other) for one, other in same)
    source, _, why = choose(model(write_query="query", beta="raw", embedding_scale="one", write_rope_base=0.0), None)
    assert source is None and "model.write_rope_base = None" in why


def test_every_field_of_a_model_is_compared():
    """A field that `differences` overlooked would be lost in another project's config.json, without a word."""
    taken = {name for mixer in MIXERS.values() for name in inspect.signature(mixer.__init__).parameters}
    how = {"compute_dtype", "remat", "unroll_layers"}
    # Compared by what they mean.
    apart = {
        "mlp_dim",
        "feed_forward",
        "ffn_shift_rank",
        "mixers",
        "norm_placement",
        *itertools.chain(*READ_BY.values()),
    }
    apart |= {"separators"}  # by the ids that a tokenizer has for them, separator_tokens
    # What training adds to the loss of a model with experts, which no other project's config.json has.
    apart |= set(OF_THE_LOSS)
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert fields == {*compare._WHOLE} | how | apart | (fields & taken)
