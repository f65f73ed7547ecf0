"""Layers of models that are not ours as a whole: `load_layer` inside a NumPy form of the rest of the model, against the
logits that transformers' own class computed; and bounded gates against the recurrence written out."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deltaformer_jax.interop import load_layer, save_layer

FOLDERS = Path(__file__).parents[1] / "fixtures" / "layers"


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x, gain, epsilon):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon) * gain


class Model:
    """A folder's arrays in float64 and its config; `mixer(n, x)` by load_layer."""

    def __init__(self, name):
        self.folder = FOLDERS / name
        self.config = json.loads((self.folder / "config.json").read_text())
        self.w = {key: np.float64(x) for key, x in load_file(self.folder / "model.safetensors").items()}
        case = load_file(self.folder / "io.safetensors")
        self.tokens, self.expected = case["tokens"], case["logits"]

    def swiglu(self, x, gate, up, down):
        return (silu(x @ self.w[gate].T) * (x @ self.w[up].T)) @ self.w[down].T

    def mixer(self, n, x):
        layer, _ = load_layer(self.folder, n)
        with jax.default_matmul_precision("highest"):
            return np.float64(layer(jnp.asarray(x, jnp.float32))[0])

    def logits(self, block, gain):
        x = self.w["model.embed_tokens.weight"][self.tokens]
        for n in range(self.config["num_hidden_layers"]):
            x = block(self, n, x)
        x = norm(x, gain(self.w["model.norm.weight"]), self.config["rms_norm_eps"])
        return x @ self.w["lm_head.weight"].T


def qwen3_next_block(model, n, x):
    at, epsilon = f"model.layers.{n}.", model.config["rms_norm_eps"]
    x = x + model.mixer(n, norm(x, 1 + model.w[at + "input_layernorm.weight"], epsilon))
    y = norm(x, 1 + model.w[at + "post_attention_layernorm.weight"], epsilon)
    shares = softmax(y @ model.w[at + "mlp.gate.weight"].T)
    best = np.argsort(-shares, -1)[..., : model.config["num_experts_per_tok"]]
    kept = np.zeros_like(shares)
    np.put_along_axis(kept, best, np.take_along_axis(shares, best, -1), -1)
    kept /= kept.sum(-1, keepdims=True)
    part = lambda at: model.swiglu(y, *(f"{at}.{name}_proj.weight" for name in ("gate", "up", "down")))
    experts = [part(f"{at}mlp.experts.{i}") for i in range(model.config["num_experts"])]
    routed = sum(kept[..., i, None] * expert for i, expert in enumerate(experts))
    return x + routed + sigmoid(y @ model.w[at + "mlp.shared_expert_gate.weight"].T) * part(f"{at}mlp.shared_expert")


def latent_attention(model, n, x):
    """kimi_linear's attention: keys and values from a latent of `kv_lora_rank`, no rotary embedding."""
    c, at = model.config, f"model.layers.{n}.self_attn."
    heads, nope, width = c["num_attention_heads"], c["qk_nope_head_dim"], c["v_head_dim"]
    split = lambda x, heads: x.reshape(*x.shape[:2], heads, -1)
    q = split(x @ model.w[at + "q_proj.weight"].T, heads)
    latent = x @ model.w[at + "kv_a_proj_with_mqa.weight"].T
    latent, shared = latent[..., : c["kv_lora_rank"]], latent[..., c["kv_lora_rank"] :]
    latent = norm(latent, model.w[at + "kv_a_layernorm.weight"], 1e-6)
    kv = split(latent @ model.w[at + "kv_b_proj.weight"].T, heads)
    k = np.concatenate([kv[..., :nope], np.repeat(shared[:, :, None], heads, 2)], -1)
    scores = np.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
    scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    out = np.einsum("bhts,bshv->bthv", softmax(scores), kv[..., nope:])
    assert out.shape[-1] == width
    return out.reshape(*x.shape[:2], -1) @ model.w[at + "o_proj.weight"].T


def kimi_linear_block(model, n, x):
    c, at = model.config, f"model.layers.{n}."
    y = norm(x, model.w[at + "input_layernorm.weight"], c["rms_norm_eps"])
    x = x + (model.mixer(n, y) if c["layer_types"][n] == "linear_attention" else latent_attention(model, n, y))
    y = norm(x, model.w[at + "post_attention_layernorm.weight"], c["rms_norm_eps"])
    at += "block_sparse_moe."
    names = lambda at, names: [f"{at}{name}.weight" for name in names]
    dense = ("gate_proj", "up_proj", "down_proj")
    if c["mlp_layer_types"][n] == "dense":
        return x + model.swiglu(y, *names(at, dense))
    shares = sigmoid(y @ model.w[at + "gate.weight"].T)
    ranked = np.argsort(-(shares + model.w[at + "gate.e_score_correction_bias"]), -1)
    best = ranked[..., : c["num_experts_per_token"]]
    kept = np.zeros_like(shares)
    np.put_along_axis(kept, best, np.take_along_axis(shares, best, -1), -1)
    kept *= c["routed_scaling_factor"] / kept.sum(-1, keepdims=True)
    expert = lambda i: model.swiglu(y, *names(f"{at}experts.{i}.", ("w1", "w3", "w2")))
    routed = sum(kept[..., i, None] * expert(i) for i in range(c["num_experts"]))
    return x + routed + model.swiglu(y, *names(f"{at}shared_experts.", dense))


@pytest.mark.parametrize(
    "name, block, gain",
    [
        ("hf_qwen3_next", qwen3_next_block, lambda w: 1 + w),
        ("hf_kimi_linear", kimi_linear_block, lambda w: w),
    ],
)
def test_layers_inside_the_rest_of_their_model(name, block, gain):
    model = Model(name)
    found = model.logits(block, gain)
    np.testing.assert_allclose(found, model.expected, rtol=0, atol=1e-5 * np.abs(model.expected).max())


HEADS, WIDTH, SIZE, TAPS = 2, 4, 12, 4


def bounded_folder(folder, kind):
    """A folder with one layer of Kimi Delta Attention as glm5_next or bailing_hybrid write it."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: (0.4 * rng.standard_normal(shape)).astype(np.float32)
    inner = HEADS * WIDTH
    tensors = {f"{x}_proj.weight": draw(inner, SIZE) for x in "qkv"}
    tensors |= {f"{x}_conv1d.weight": draw(inner, 1, TAPS) for x in "qkv"}
    tensors |= {"b_proj.weight": draw(HEADS, SIZE), "A_log": draw(HEADS), "dt_bias": draw(inner)}
    tensors |= {"o_norm.weight": 1 + draw(WIDTH)}
    config = {"model_type": kind, "hidden_size": SIZE, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
    if kind == "glm5_next":
        for gate in "fg":
            tensors[f"{gate}_a_proj.weight"], tensors[f"{gate}_b_proj.weight"] = draw(WIDTH, SIZE), draw(inner, WIDTH)
        config["linear_attn_config"] = {"head_dim": WIDTH, "num_heads": HEADS, "gate_lower_bound": -3.0}
        module, output = "model.language_model.layers.1.self_attn.", "o_proj.weight"
    else:
        tensors |= {f"{gate}_proj.weight": draw(inner, SIZE) for gate in "fg"}
        config |= {"num_attention_heads": HEADS, "head_dim": WIDTH, "kda_lower_bound": -3.0, "layer_group_size": 4}
        module, output = "model.layers.1.attention.", "dense.weight"
    tensors[output] = draw(SIZE, inner)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({module + name: x for name, x in tensors.items()}, folder / "model.safetensors")
    return {name: np.float64(x) for name, x in tensors.items()} | {"output": np.float64(tensors[output])}


def written_out(w, x):
    """Kimi Delta Attention with the bounded decay, token by token."""
    by_head = lambda y: y.reshape(*y.shape[:2], HEADS, WIDTH)
    gate = lambda g: (
        x @ w[f"{g}_proj.weight"].T
        if f"{g}_proj.weight" in w
        else (x @ w[f"{g}_a_proj.weight"].T @ w[f"{g}_b_proj.weight"].T)
    )

    def taken(name):
        y = x @ w[f"{name}_proj.weight"].T
        taps = w[f"{name}_conv1d.weight"][:, 0]
        padded = np.pad(y, [(0, 0), (TAPS - 1, 0), (0, 0)])
        return by_head(silu(sum(padded[:, j : j + y.shape[1]] * taps[:, j] for j in range(TAPS))))

    unit = lambda y: y / np.sqrt(np.sum(y * y, -1, keepdims=True) + 1e-6)
    q, k, v = unit(taken("q")) * WIDTH**-0.5, unit(taken("k")), taken("v")
    beta = sigmoid(x @ w["b_proj.weight"].T)
    rate = np.exp(w["A_log"])[:, None]
    decay = np.exp(-3.0 * sigmoid(rate * by_head(gate("f") + w["dt_bias"])))
    state, out = np.zeros((len(x), HEADS, WIDTH, WIDTH)), []
    for t in range(x.shape[1]):
        state = state * decay[:, t, ..., None]
        error = v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + np.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error)
        out.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]))
    out = norm(np.stack(out, 1), w["o_norm.weight"], 1e-5) * by_head(sigmoid(gate("g")))
    return out.reshape(*x.shape[:2], -1) @ w["output"].T


@pytest.mark.parametrize("kind", ["glm5_next", "bailing_hybrid"])
def test_bounded_gates(kind, tmp_path):
    tensors = bounded_folder(tmp_path / kind, kind)
    x = np.random.default_rng(0).standard_normal((2, 20, SIZE))
    layer, config = load_layer(tmp_path / kind, 1)
    with jax.default_matmul_precision("highest"):
        found = layer(jnp.asarray(x, jnp.float32))[0]
    expected = written_out(tensors, x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert config.num_layers == 1 and config.d_model == SIZE


@pytest.mark.parametrize(
    "name, layers", [("hf_qwen3_next", None), ("hf_kimi_linear", [0]), ("glm5_next", [1]), ("bailing_hybrid", [1])]
)
def test_saved_layers_are_the_loaded_ones(name, layers, tmp_path):
    """Names, shapes, dtypes and bits; also from a config.json alone, in float32 and by the released files' names."""
    folder = FOLDERS / name
    if not folder.exists():
        bounded_folder(folder := tmp_path / name, name)
    source, mixers = load_file(folder / "model.safetensors"), {}
    rounded = {key: x.astype(ml_dtypes.bfloat16) if "proj" in key else x for key, x in source.items()}
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_bytes((folder / "config.json").read_bytes())
    count = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    layers = layers or range(count)
    for n in layers:
        mixers[n], _ = load_layer(folder, n)
        save_layer(mixers[n], tmp_path / "alone", n, like=like)
    save_file(rounded, like / "model.safetensors")
    for n in layers:
        save_layer(load_layer(like, n)[0], tmp_path / "out", n, like=like)
        for x, y in zip(jax.tree.leaves(mixers[n]), jax.tree.leaves(load_layer(tmp_path / "alone", n)[0]), strict=True):
            np.testing.assert_array_equal(x, y)
    for out, expected in (("out", rounded), ("alone", source)):
        found = {}
        for n in layers:
            found |= load_file(tmp_path / out / f"layer-{n:05d}.safetensors")
        places = [f"layers.{n}.{module}." for n in layers for module in ("self_attn", "linear_attn", "attention")]
        expected = {key: x for key, x in expected.items() if any(place in key for place in places)}
        if out == "alone":  # a file of text alone has no prefix
            expected = {key.replace("language_model.", ""): x for key, x in expected.items()}
        assert set(found) == set(expected) and len(found) > 8
        for key, x in expected.items():
            assert found[key].shape == x.shape and found[key].dtype == x.dtype, key
            np.testing.assert_array_equal(found[key], x)


def test_a_gate_that_was_trained_becomes_one_product(tmp_path):
    bounded_folder(tmp_path / "in", "bailing_hybrid")
    layer, _ = load_layer(tmp_path / "in", 1)
    layer.decay.down[...] = layer.decay.down[...] * 1.5 + 0.1
    save_layer(layer, tmp_path / "out", 1, like=tmp_path / "in")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, SIZE)), jnp.float32)
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(load_layer(tmp_path / "out", 1)[0](x)[0], layer(x)[0], rtol=0, atol=1e-5)


def test_errors_of_saving_are_one_line(tmp_path):
    folder = FOLDERS / "hf_kimi_linear"
    layer, _ = load_layer(folder, 0)
    save_layer(layer, tmp_path / "out", 0, like=folder)
    cases = [
        (dict(layer=0), FileExistsError, "out: holds layer 0 already; give another folder"),
        (dict(layer=1), ValueError, "layer 1 of kimi_linear is full_attention"),
        (dict(layer=0, like=FOLDERS / "hf_qwen3_next"), ValueError, "not one of layer 0: .* is absent in the mixer"),
        (dict(layer=0, dtype="int8"), ValueError, "dtype='int8' must be one of float32"),
        (dict(layer=0, like=tmp_path / "nowhere"), FileNotFoundError, "no such file"),
    ]
    for given, error, message in cases:
        place = tmp_path / ("out" if error is FileExistsError else "other")
        with pytest.raises(error, match=message) as caught:
            save_layer(layer, place, **{"like": folder} | given)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("hf_kimi_linear", dict(linear_attn_config=[1]), r"linear_attn_config = \[1\]: give an object"),
        ("hf_kimi_linear", dict(linear_attn_config={"num_heads": "2"}), r"linear_attn_config\.num_heads = '2': give a"),
        ("hf_kimi_linear", dict(linear_attn_config={"head_dim": 1.5}), r"linear_attn_config\.head_dim = 1\.5: give a"),
        ("hf_kimi_linear", dict(linear_attn_config={"kda_layers": 3}), r"linear_attn_config\.kda_layers = 3: give a"),
        (
            "hf_kimi_linear",
            dict(linear_attn_config={"num_heads": 2, "head_dim": 16}, layer_types=None),
            "layer_types or linear_attn_config.kda_layers: missing",
        ),
        ("hf_kimi_linear", dict(linear_num_heads=None, linear_attn_config=None), "linear_num_heads: missing"),
        ("hf_qwen3_next", dict(rope_parameters={"rope_theta": "x"}), r"rope_parameters\.rope_theta = 'x': give a"),
        ("hf_qwen3_next", dict(model_type=[1]), r"model_type = \[1\] is not one of"),
        ("hf_qwen3_next", dict(rope_parameters=3), "rope_parameters = 3: give an object"),
        ("hf_qwen3_next", dict(linear_num_value_heads=3), "3"),
    ],
)
def test_fields_of_another_kind_are_named(name, fields, message, tmp_path):
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((FOLDERS / name / file).read_bytes())
    values = json.loads((tmp_path / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as error:
        load_layer(tmp_path, 0)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_errors_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="layer 1 of kimi_linear is full_attention: only 'linear_attention' has"):
        load_layer(FOLDERS / "hf_kimi_linear", 1)
    for wrong in (2, True):
        with pytest.raises(ValueError, match=rf"layer={wrong}: .* has layers 0 to 1"):
            load_layer(FOLDERS / "hf_kimi_linear", wrong)
    with pytest.raises(ValueError, match=r"model_type = 'llama' is not one of qwen3_next, .*; load_pretrained reads"):
        load_layer(FOLDERS.parent / "pretrained" / "hf_llama", 0)
    (tmp_path / "config.json").write_text('{"model_type": "deltaformer_jax", "hidden_size": 8}')
    with pytest.raises(ValueError, match=r"'deltaformer_jax' is not one of .*; load_pretrained reads it"):
        load_layer(tmp_path, 0)
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text((FOLDERS / "hf_kimi_linear" / "config.json").read_text())
    tensors = load_file(FOLDERS / "hf_kimi_linear" / "model.safetensors")
    at = "model.layers.0.self_attn."
    del tensors[at + "A_log"]
    tensors[at + "o_norm.weight"] = np.ones(3, np.float32)
    tensors[at + "more"] = np.ones(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_layer(folder, 0)
    said = str(error.value)
    assert "missing self_attn.A_log" in said and "unknown self_attn.more" in said and "\n" not in said
    assert "self_attn.o_norm.weight: shape [3], not [16]" in said


def test_the_examples_of_the_docs(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    load, save = re.findall(r"^``` python\n(.*?)^```", text, re.M | re.S)
    names = {"FOLDER": FOLDERS / "hf_kimi_linear", "OUT": tmp_path / "out", "x": jnp.ones((2, 5, 48))}
    exec(load, names)
    exec(save, names)
    assert names["y"].shape == (2, 5, 48) and (tmp_path / "out" / "layer-00000.safetensors").exists()
