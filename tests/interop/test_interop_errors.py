"""Folders that do not fit: one error with everything that is wrong; and shards, other dtypes, older files."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from deltaformer_jax import LanguageModel, Mixer, ModelConfig
from deltaformer_jax.interop import load_pretrained, save_pretrained

PRETRAINED = Path(__file__).parents[1] / "fixtures" / "pretrained"


@pytest.fixture
def copy(tmp_path):
    """copy(name, tensors=function, **fields): a fixture with other tensors and fields of config.json."""

    def make(name, tensors=lambda tensors: tensors, **fields):
        folder = tmp_path / name
        shutil.copytree(PRETRAINED / name, folder)
        values = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(values))
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")
        return folder

    return make


def test_every_tensor_that_does_not_fit_is_named_at_once(copy):
    def spoil(tensors):
        tensors["model.layers.0.surprise"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(5, np.float32)
        tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((80, 48), np.int8)
        del tensors["model.layers.1.self_attn.q_proj.weight"]
        return tensors

    with pytest.raises(ValueError) as error:
        load_pretrained(copy("hf_llama", spoil))
    text = str(error.value)
    assert "missing model.layers.1.self_attn.q_proj.weight" in text and "unknown model.layers.0.surprise" in text
    assert "model.norm.weight: shape [5], not [48]" in text and "up_proj.weight: dtype I8" in text and "\n" not in text


def test_misshapen_tensors_whose_rows_are_laid_end_to_end_are_named_with_the_others(copy):
    prefix = "model.layers.0.linear_attn."

    def spoil(tensors):
        for name in "qk":
            tensors[f"{prefix}{name}_conv1d.weight"] = tensors[f"{prefix}{name}_conv1d.weight"][:, :, :3].copy()
        return tensors | {
            f"{prefix}v_conv1d.weight": np.ones((), np.float32),
            "model.norm.weight": np.zeros(5, np.float32),
        }

    with pytest.raises(ValueError) as error:
        load_pretrained(copy("hf_olmo_hybrid", spoil))
    text = str(error.value)
    assert "q_conv1d.weight: shape [43, 1, 3], not [32, 1, 4]" in text and "k_conv1d.weight: shape [43, 1, 3]" in text
    assert "v_conv1d.weight: shape [], not [64, 1, 4]" in text and "model.norm.weight: shape [5]" in text


def test_rows_laid_end_to_end_are_counted(copy):
    def shorten(tensors):
        prefix = "model.layers.0.linear_attn."
        return tensors | {f"{prefix}q_conv1d.weight": tensors[f"{prefix}q_conv1d.weight"][:3]}

    with pytest.raises(ValueError, match=r"q_conv1d\.weight and its fellows: 88 rows, not 128"):
        load_pretrained(copy("hf_olmo_hybrid", shorten))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "hf_llama",
            dict(rope_scaling={"rope_type": "llama3", "factor": 2.0}, rope_parameters=None),
            "rope_scaling: low_freq_factor, high_freq_factor, original_max_position_embeddings missing",
        ),
        (
            "hf_llama",
            dict(rope_parameters={"rope_type": "longrope"}),
            "only 'default', 'linear', 'yarn', 'llama3' have",
        ),
        (
            "hf_llama",
            dict(rope_parameters={"rope_type": "linear", "factor": 0.5}),
            "rope_parameters = .*the factor 0.5 must be at least 1",
        ),
        (
            "hf_llama",
            dict(rope_parameters={"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, "attention_factor": 1.0}),
            r"attention_factor = 1\.0: has no equivalent here .*beta_fast = 16\.0: has no equivalent",
        ),
        ("hf_llama", dict(attention_bias=True, mlp_bias=True), r"mlp_bias = True: .*attention_bias = True"),
        ("hf_llama", dict(moon_phase=3), "moon_phase = 3: is not known here"),
        ("hf_llama", dict(model_type="lama"), "model_type = 'lama' is not one of .*; did you mean llama"),
        ("hf_llama", dict(vocab_size=None), "vocab_size: missing"),
        ("hf_llama", dict(model_type={"a": 1}), "model_type = {'a': 1} is not one of"),
        ("hf_qwen3_5", dict(layer_types=["full_attention"]), "must name linear_attention or full_attention"),
        ("fla_delta_net", dict(qk_norm="sum", qk_activation="elu"), "qk_norm = 'sum'.*qk_activation = 'elu'"),
        ("fla_gla", dict(feature_map="relu"), "feature_map = 'relu'"),
        ("fla_deltaformer", dict(hidden_act="powlu", attnres_block_size=2), "'powlu'.*attnres_block_size = 2"),
        ("fla_forgetting_transformer", dict(qk_norm=True, window_size=8), "qk_norm = True.*window_size = 8: its class"),
        ("fla_deltaformer", dict(window_size=8), "window_size = 8: its class sees all tokens of a text"),
        ("fla_delta_net", dict(conv_bias=True), "conv_bias = True: its class makes no such biases"),
        ("hf_llama", dict(num_hidden_layers=10**9), "num_hidden_layers = 1000000000: give a whole number from 1 to 10"),
        ("hf_llama", dict(quantization_config={"bits": 4}), "quantization_config: its tensors are quantised; give"),
        ("hf_llama", dict(pruned_heads={"0": [1]}), "pruned_heads = {'0': .*: is not known here"),
        ("hf_llama", dict(moon_phase=False), "moon_phase = False: is not known here"),
        (
            "hf_llama",
            dict(
                rope_scaling={"type": "linear", "factor": 2.0},
                rope_parameters={"rope_type": "linear", "factor": 2.0},
            ),
            "rope_parameters has a scaling too",
        ),
        ("hf_llama", dict(rope_parameters={"factor": 2.0}), r"rope_parameters\.factor = 2\.0: is not known here"),
        ("hf_llama", dict(rope_parameters={"mrope_section": [1]}), r"rope_parameters\.mrope_section = \[1\]: is not"),
        ("hf_llama", dict(rope_parameters={"full_attention": {}}), r"rope_parameters\.full_attention = \{\}: is not"),
        (
            "hf_llama",
            dict(rope_parameters={"rope_theta": 0}),
            r"rope_parameters\.rope_theta = 0: give a number above 0",
        ),
        ("hf_llama", dict(rope_parameters={"rope_theta": [1]}), r"rope_parameters\.rope_theta = \[1\]: give a number"),
        ("hf_qwen3_5", dict(rope_parameters={"partial_rotary_factor": {}}), r"partial_rotary_factor = \{\}: give a n"),
        ("hf_qwen3_5", dict(rope_parameters={"partial_rotary_factor": "x"}), r"partial_rotary_factor = 'x': give a n"),
        ("hf_llama", dict(rope_theta=float("inf")), "rope_theta = inf: give a number above 0"),
        ("fla_gla", dict(attn={"layers": [0], "num_heads": 2, "rope_theta": "x"}), r"attn\.rope_theta = 'x': give a n"),
        ("hf_llama", dict(eos_token_id="</s>"), "eos_token_id = '</s>': give a whole number, 0 or more, or a list"),
        ("hf_llama", dict(rope_parameters=[1]), r"rope_parameters = \[1\]: give an object"),
        ("hf_llama", dict(num_attention_heads=0), "num_attention_heads = 0: give a whole number above 0"),
        ("hf_llama", dict(hidden_size="48", vocab_size=True), "hidden_size = '48': give .*vocab_size = True: give"),
        ("hf_qwen3", dict(layer_types=3), "layer_types = 3: give a list of names"),
        ("hf_qwen3_5", dict(attn_output_gate=False), "attn_output_gate = False: only True has"),
        ("hf_qwen3_5", dict(mamba_ssm_dtype="bfloat16"), "mamba_ssm_dtype = 'bfloat16': only 'float32' has"),
        ("hf_qwen3_5", dict(output_gate_type="sigmoid"), "output_gate_type = 'sigmoid': only 'swish' or 'silu' has"),
        ("fla_gla", dict(attn=[3]), r"attn = \[3\]: give an object or a list of objects"),
        ("fla_gla", dict(attn={"num_heads": 2}), r"attn\.layers: missing"),
        ("fla_gla", dict(attn={"layers": [0], "num_heads": 3}), r"attn\.num_heads = 3: must divide hidden_size = 64"),
        (
            "fla_gla",
            dict(attn=[{"layers": [0, 0], "num_heads": 2}, {"layers": [0], "num_heads": 2}]),
            r"attn\.layers = \[0, 0\]: names a layer twice; attn\.layers = \[0\]: names a layer twice",
        ),
        ("hf_llama", dict(num_attention_heads=5), "hidden_size = 48: must be a multiple of num_attention_heads = 5"),
        ("fla_transformer", dict(num_heads=5), r"hidden_size = \d+: must be a multiple of num_heads = 5"),
        ("hf_olmo_hybrid", dict(layer_types=["linear_attention"] * 2), "layer_types: its class needs both"),
        ("fla_gla", dict(attn={"layers": [9], "num_heads": 2}), r"attn\.layers = \[9\]: the layers are 0 to 0"),
        ("fla_gla", dict(attn={"layers": [0], "num_heads": 0}), r"attn\.num_heads = 0: give a whole number above 0"),
        ("fla_gla", dict(attn={"layers": [0], "num_heads": 2, "sink": 1}), r"attn\.sink = 1: is not known here"),
    ],
)
def test_fields_without_an_equivalent_are_refused_by_name(copy, name, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(copy(name, **fields))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_fields_of_released_files_that_change_nothing_are_accepted(copy):
    said = dict(attn_output_gate=True, mamba_ssm_dtype="float32", output_gate_type="swish", mtp_num_hidden_layers=1)
    said |= dict(mtp_use_dedicated_embeddings=False, full_attention_interval=4, mlp_only_layers=[])

    def with_prediction(tensors):
        return tensors | {"mtp.fc.weight": np.zeros((2, 2), np.float32)}

    rope = json.loads((PRETRAINED / "hf_qwen3_5" / "config.json").read_text())["rope_parameters"]
    folder = copy("hf_qwen3_5", with_prediction, **said, rope_parameters=rope | dict(mrope_interleaved=True))
    assert load_pretrained(folder)[1] == load_pretrained(PRETRAINED / "hf_qwen3_5")[1]


def test_fields_and_buffers_without_a_function_are_left_out(copy):
    """How it runs, how texts are drawn, who wrote the folder; and angles that older files hold and classes compute."""
    said = dict(is_llama_config=True, _attn_implementation_autoset=True, unsloth_version="2024.9", _notes=[1])
    said |= {"transformers.js_config": {"dtype": "q4"}}
    said |= dict(use_flash_attn=True, hidden_dropout=0.1, temperature=0.6, pruned_heads={}, torchscript=False)
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    folder = copy("hf_llama", lambda tensors: tensors | angles, **said)
    assert load_pretrained(folder)[1] == load_pretrained(PRETRAINED / "hf_llama")[1]


def test_a_head_beside_a_tied_table_is_the_table_or_refused(copy):
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    folder = copy("hf_llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=rf"tie_word_embeddings = true, but {head} is not {table}; set it to false in"):
        load_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {head: tensors[table]}, folder / "model.safetensors")
    assert load_pretrained(folder)[1].tie_embeddings
    save_file(tensors | {head: tensors[table][1:]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{head}: shape \[63, 48\], not \[64, 48\]"):
        load_pretrained(folder)


def test_a_multimodal_file(copy):
    """Its outer field ties the embeddings, whatever the inner one says; no tensor may be there under two names."""

    def inside(tensors):
        del tensors["lm_head.weight"]
        return {name.replace("model.", "model.language_model.", 1): array for name, array in tensors.items()}

    folder = copy("hf_qwen3_5", inside)
    text = json.loads((folder / "config.json").read_text())
    outer = dict(model_type="qwen3_5", tie_word_embeddings=True, text_config=text | dict(tie_word_embeddings=False))
    (folder / "config.json").write_text(json.dumps(outer))
    assert load_pretrained(folder)[1].tie_embeddings
    tensors = load_file(folder / "model.safetensors")
    both = {"model.norm.weight": tensors["model.language_model.norm.weight"]}
    save_file(tensors | both, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.\S*norm\.weight and model\.\S*norm\.weight are the same tensor of"):
        load_pretrained(folder)


def test_a_missing_up_map_is_missing(copy):
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=f"fla_delta_net: missing {name}$"):
        load_pretrained(copy("fla_delta_net", lambda tensors: {k: v for k, v in tensors.items() if k != name}))


def test_pickles_and_empty_folders_are_refused(copy, tmp_path):
    folder = copy("hf_llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle"):
        load_pretrained(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load_pretrained(folder)
    (folder / "model.safetensors").write_text("not one")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_pretrained(tmp_path / "nothing")


def test_shards_and_their_index(copy, tmp_path):
    model, config = load_pretrained(PRETRAINED / "hf_qwen3")
    save_pretrained(model, config, tmp_path / "out", shard_bytes=30_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    again, _ = load_pretrained(tmp_path / "out")
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)
    next((tmp_path / "out").glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"shards of .* are missing: model-00002"):
        load_pretrained(tmp_path / "out")
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="outside the folder"):
        load_pretrained(tmp_path / "out")
    for wrong in (["x"], {"x": 3}, {}, None):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(ValueError, match=r"index\.json: weight_map must name the file of each tensor, not "):
            load_pretrained(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_files_come_back_bit_for_bit(tmp_path, dtype):
    model, config = load_pretrained(PRETRAINED / "fla_kda")
    save_pretrained(model, config, tmp_path / "a", dtype=dtype)
    narrow, _ = load_pretrained(tmp_path / "a")
    save_pretrained(narrow, config, tmp_path / "b", dtype=dtype)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_older_files_of_fla(copy):
    """The feed-forward layer's two maps in one tensor; o_norm as norm; a tensor D without a function."""

    def older(tensors):
        mlp = "model.layers.0.mlp."
        both = [tensors.pop(f"{mlp}{name}_proj.weight") for name in ("gate", "up")]
        tensors[f"{mlp}gate_proj.weight"] = np.concatenate(both)
        tensors["model.layers.0.attn.norm.weight"] = tensors.pop("model.layers.0.attn.o_norm.weight")
        return tensors | {"model.layers.0.attn.D": np.zeros(4, np.float32)}

    expected, _ = load_pretrained(PRETRAINED / "fla_gated_deltanet")
    found, _ = load_pretrained(copy("fla_gated_deltanet", older))
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(x, y)


SIZES = dict(vocab_size=70, d_model=32, num_layers=4, mlp_dim=24, embedding_scale="one", tie_embeddings=False)
HEADS = dict(num_heads=2, num_kv_heads=2, head_dim=16)
DELTA = dict(beta_bias=False, value_dim=16, conv_size=4, output_gate="on")
ATTENTION = Mixer(
    "softmax_attention", num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, conv_size=0, output_gate="off"
)
# Layers of several kinds of attention, "attn" as a list.
WINDOWED = Mixer(ATTENTION.name, **dict(ATTENTION.overrides) | dict(window=4, qkv_bias=False, num_kv_heads=1))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("delta_net", dict(mixers=("delta_net",), **HEADS, **DELTA | dict(conv_size=0, input_silu=True))),
        # What the pattern of four has too is on demand.
        pytest.param("delta_net", dict(mixers=("delta_net", ATTENTION), **HEADS, **DELTA), marks=pytest.mark.rare),
        ("delta_net", dict(mixers=(Mixer("delta_net", num_heads=2, head_dim=16, **DELTA), ATTENTION))),
        ("delta_net", dict(mixers=("delta_net", ATTENTION, WINDOWED, ATTENTION), **HEADS, **DELTA)),
        ("delta_net", dict(mixers=(WINDOWED, ATTENTION))),
        (
            "gated_deltanet",
            dict(mixers=("gated_delta_net",), **HEADS, **DELTA, num_value_heads=4, output_gate_activation="sigmoid"),
        ),
        (
            "kda",
            dict(
                mixers=("kimi_delta_attention",),
                **HEADS,
                **DELTA | dict(value_dim=32, gate_rank=32),
                num_value_heads=4,
                output_gate_bias=True,
                decay_lower_bound=-5.0,
                negative_eigenvalues=True,
            ),
        ),
        ("transformer", dict(mixers=("softmax_attention",), **HEADS, qkv_bias=True)),
        (
            "deltaformer",
            dict(mixers=("delta_former",), **HEADS, write_query="query", beta="raw", tie_embeddings=True),
        ),
    ],
)
def test_other_shapes_and_depths_there_and_back(tmp_path, kind, fields):
    config = ModelConfig(**SIZES | fields)
    # Every parameter has other values, so that a mistaken place shows.
    numbers = np.random.default_rng(0)
    model = jax.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: jnp.asarray(numbers.normal(0, 0.2, x.shape), x.dtype), model)
    assert save_pretrained(model, config, tmp_path / "out", model_type=kind) == kind
    again, read = load_pretrained(tmp_path / "out")
    assert save_pretrained(again, read, tmp_path / "back") == kind
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    tokens = numbers.integers(0, 70, (2, 12))
    call = jax.jit(lambda model, tokens, cache=None: model(tokens, cache=cache))
    whole = np.asarray(call(model, tokens)[0])
    np.testing.assert_array_equal(whole, call(again, tokens)[0])
    logits, cache = call(again, tokens[:, :6], again.init_cache(2, 12))
    rest, _ = call(again, tokens[:, 6:], cache)
    np.testing.assert_allclose(np.concatenate([logits, rest], 1), whole, rtol=0, atol=1e-5 * np.abs(whole).max())


def test_a_model_that_no_other_project_has_is_written_as_ours(tmp_path):
    config = ModelConfig(**SIZES, mixers=("delta_former", Mixer("retention", num_heads=1)), kv_shift=True, **HEADS)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    assert save_pretrained(model, config, tmp_path / "out") == "deltaformer_jax"
    again, config_again = load_pretrained(tmp_path / "out")
    assert config_again == config
    for x, y in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    values["model"]["mixers"][0] = "os:system"
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="'os:system': a class of one's own has no place"):
        load_pretrained(tmp_path / "out")


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path):
    model, config = load_pretrained(PRETRAINED / "hf_llama")
    model = jax.tree.map(lambda x: x * 1e6, model)
    with pytest.raises(ValueError, match=r"cannot hold .*; use bfloat16"):
        save_pretrained(model, config, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists()


def test_what_a_model_type_cannot_say_is_listed(tmp_path):
    config = ModelConfig(**SIZES, mixers=("delta_former",), kv_shift=True, **HEADS)
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"deltaformer cannot say .*model\.kv_shift = True.*model\.write_query = 'key'"
    ):
        save_pretrained(model, config, tmp_path / "out", model_type="deltaformer")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="did you mean deltaformer"):
        save_pretrained(model, config, tmp_path / "out", model_type="deltaforme")


@pytest.mark.parametrize("kind", [None, "deltaformer_jax"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_layers=4), r"blocks\.0\.\S+ is \[2, .*\] in the model and \[4, .*\] by config"),
        (dict(num_layers=1), r"blocks\.0\.\S+ is \[2, .*\] in the model and \[1, .*\] by config"),
        (dict(vocab_size=65), "vocab_size is 64 in the model and 65 in config"),  # padded to the same table
        (dict(vocab_size=400), r"embedding\.head is \[48, 128\] in the model and \[48, 512\] by config"),
        (dict(tie_embeddings=True), r"embedding\.head is \[48, 128\] in the model and absent by config"),
    ],
)
def test_a_model_of_another_config_is_refused(tmp_path, kind, fields, message):
    model, config = load_pretrained(PRETRAINED / "hf_llama")
    other = dataclasses.replace(config, **fields)
    with pytest.raises(ValueError, match=rf"out: the model is not one of this config: .*{message}.*; give") as error:
        save_pretrained(model, other, tmp_path / "out", model_type=kind)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_a_missing_tokenizer_is_said_before_anything_is_written(tmp_path):
    model, config = load_pretrained(PRETRAINED / "hf_llama")
    with pytest.raises(FileNotFoundError, match=r"tokenizer='nowhere/tokenizer\.json': no such file; give"):
        save_pretrained(model, config, tmp_path / "out", tokenizer="nowhere/tokenizer.json")
    assert not (tmp_path / "out").exists()
    assert save_pretrained(model, config, tmp_path / "out") == "llama"


def test_a_folder_with_weights_is_left_alone(tmp_path):
    model, config = load_pretrained(PRETRAINED / "hf_llama")
    save_pretrained(model, config, tmp_path)
    with pytest.raises(FileExistsError, match="holds weights already"):
        save_pretrained(model, config, tmp_path)
