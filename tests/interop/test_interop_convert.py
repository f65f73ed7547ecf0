"""`python -m deltaformer_jax.convert`: a folder as a run that sample and evaluate read, and back."""

import importlib.util
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from deltaformer_jax import LanguageModel, ModelConfig, convert
from deltaformer_jax.config import DataConfig
from deltaformer_jax.data.tokenizer import ByteTokenizer, TaskVocabulary, pretrained_tokenizer
from deltaformer_jax.interop import save_pretrained
from deltaformer_jax.interop.kept import KEPT_FILE, read_kept
from deltaformer_jax.sample.__main__ import main as sample
from deltaformer_jax.training.checkpoints.restore import restore

HARNESS = Path(__file__).parents[1] / "fixtures" / "harness"


@pytest.fixture
def folder(tmp_path):
    config = ModelConfig(
        vocab_size=257,
        d_model=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        mlp_dim=32,
        mixers=("softmax_attention",),
        embedding_scale="one",
    )
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    out = tmp_path / "folder"
    save_pretrained(
        LanguageModel(config, rngs=nnx.Rngs(0)), config, out, tokenizer=tmp_path / "tokenizer.json", dtype="bfloat16"
    )
    return out


def test_there_and_back(folder, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    convert.main([str(folder), "--workdir", str(run)])
    assert capsys.readouterr().out.endswith(f"parameters (softmax_attention) in {run}\n")
    sample(["--workdir", str(run), "--prompt", "ab", "--tokens", "3", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 3
    convert.main(["--to-hf", "--workdir", str(run), "--out", str(out), "--dtype", "bfloat16"])
    assert capsys.readouterr().out == f"{out}: a llama, from step 0\n"
    ours, theirs = load_file(out / "model.safetensors"), load_file(folder / "model.safetensors")
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert "converted with" in card and "2 layers of width 32" in card and "Evaluation on held-out data: none" in card
    assert f"- Base model: `{folder}`. Its parameters were not trained further here." in card
    assert f"- Written by: `python -m deltaformer_jax.convert {folder} --workdir DIR`, then `python" in card
    assert "- Training data: that of the base model" in card and "deltaformer_jax.train" not in card


def test_the_first_token_and_the_positions_come_back(folder, tmp_path, capsys):
    """Those of an imported folder as they stand; those of a run of ours are its end-of-text and its rows' length."""

    def converted(name, **said):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | said))
        run, out = tmp_path / f"run_{name}", tmp_path / f"out_{name}"
        convert.main([str(folder), "--workdir", str(run)])
        return run, out

    def written(run, out):
        convert.main(["--to-hf", "--workdir", str(run), "--out", str(out)])
        config, generation = (
            json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config")
        )
        assert config["bos_token_id"] == generation["bos_token_id"] and config["eos_token_id"] == 256
        return config["bos_token_id"], config["max_position_embeddings"]

    assert written(*converted("imported", bos_token_id=7, max_position_embeddings=96)) == (7, 96)
    run, out = converted("without", bos_token_id=None)
    assert written(run, out) == (None, 96)
    (run / KEPT_FILE).unlink()  # as a run that was trained here
    assert written(run, tmp_path / "own") == (256, DataConfig().sequence_length)
    with pytest.raises(SystemExit):
        converted("wrong", bos_token_id="<s>")
    assert "config.json: bos_token_id = '<s>': give a whole number, 0 or more" in capsys.readouterr().err


def test_dtypes_and_what_a_text_begins_with_come_along(tmp_path):
    """An imported model is prompted as by its own tokenizer, one that was trained here after end-of-text; and each
    folder that is written says so."""
    spec = importlib.util.spec_from_file_location("with_bos", HARNESS / "with_bos.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    folder = module.with_bos(tmp_path / "folder")
    own = pretrained_tokenizer(folder).prefix
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 383]}')
    config = json.loads((folder / "tokenizer_config.json").read_text())

    def there_and_back(folder, name):
        run, out = tmp_path / f"run_{name}", tmp_path / f"out_{name}"
        convert.main([str(folder), "--workdir", str(run)])
        convert.main(["--to-hf", "--workdir", str(run), "--out", str(out)])
        return run, restore(run).tokenizer.prefix, json.loads((out / "tokenizer_config.json").read_text())

    mixed = load_file(folder / "model.safetensors")
    mixed = {n: x if "norm" in n or "q_proj" in n else x.astype(ml_dtypes.bfloat16) for n, x in mixed.items()}
    save_file(mixed | {"lm_head.weight": mixed["lm_head.weight"].astype(np.float16)}, folder / "model.safetensors")
    run, prefix, said = there_and_back(folder, "imported")
    back = safe_open(tmp_path / "out_imported" / "model.safetensors", "numpy")
    for name, x in load_file(folder / "model.safetensors").items():  # each in its own dtype
        assert back.get_tensor(name).dtype == x.dtype
        np.testing.assert_array_equal(back.get_tensor(name), x)
    assert restore(run).tokenizer.ends == {5, 383, restore(run).tokenizer.eot}
    assert read_kept(tmp_path / "out_imported") == {"pad_token_id": None} | read_kept(folder)
    assert prefix == own and own.ids == own.ids[:1] == (384,) and said == config
    (run / KEPT_FILE).unlink()  # as a run that was trained here
    assert restore(run).tokenizer.prefix.ids == (restore(run).tokenizer.eot,)
    convert.main(["--to-hf", "--workdir", str(run), "--out", str(tmp_path / "trained")])
    _, prefix, said = there_and_back(tmp_path / "trained", "trained")
    assert prefix.ids == (restore(run).tokenizer.eot,) and not prefix.elsewhere
    assert said["bos_token"] == said["eos_token"] == "<|endoftext|>" and said["trained_by"] == "deltaformer_jax"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workdir", "run"], "give the FOLDER to read and --workdir DIR"),
        (["--to-hf", "--workdir", "run"], "--to-hf: give --workdir DIR and --out FOLDER"),
        (["--to-hf", "--workdir", "nowhere", "--out", "x"], "--workdir nowhere: no such folder"),
        (["nowhere", "--workdir", "run"], "nowhere: no such folder"),
        (["x", "--workdir", "run", "--dtype", "bfloat16"], "--dtype: is for --to-hf; leave it out"),
        (["x", "--workdir", "run", "--step", "0"], "--step: is for --to-hf; leave it out"),
        (
            ["--to-hf", "--workdir", "x", "--out", "y", "--compute_dtype", "float32"],
            "--compute_dtype: is for reading a",
        ),
    ],
)
def test_wrong_flags_are_one_line(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        convert.main(flags)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
# What is changed in a good folder: files' contents, None to remove one.
BROKEN = [
    (dict.fromkeys(["config.json", "model.safetensors", "tokenizer.json"]), "config.json: no such file; give a folder"),
    ({"model.safetensors": None, "pytorch_model.bin": "x"}, "pytorch_model.bin is a pickle, which can run any program"),
    ({"model.safetensors": None}, "holds neither model.safetensors nor model.safetensors.index.json"),
    (
        {"model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"},
        "model.safetensors: not a safetensors file: a pointer of Git LFS; get the file itself with git lfs pull",
    ),
    ({"model.safetensors": None, "adapter_model.safetensors": "x"}, "holds adapters alone, adapter_model.safetensors"),
    ({"model.safetensors": None, "model.gguf": "x"}, "nor model.safetensors.index.json; model.gguf is not read"),
    ({"model.safetensors": "abc"}, "model.safetensors: not a safetensors file: "),
    ({"model.safetensors": 1000}, "model.safetensors: not a safetensors file: "),
    ({"model.safetensors": None, "model.safetensors.index.json": INDEX}, "are missing: model-00001-of-00002.safetens"),
    ({"model.safetensors": None, "model.safetensors.index.json": "{"}, "index.json: not JSON: "),
    ({"config.json": '{"model_type": "bert"}'}, "model_type = 'bert' is not one of llama, "),
    ({"config.json": '{"model_type": "qwen3_next"}'}, "; load_layer reads layers of it"),
    ({"config.json": "{"}, "config.json: not JSON: "),
    ({"tokenizer.json": None}, "tokenizer.json: no such file; give a tokenizer.json with --tokenizer FILE"),
    ({"tokenizer.json": TaskVocabulary(400).file_text}, " tokens, the model in "),
    ({"tokenizer_config.json": "{"}, "tokenizer_config.json: not JSON: "),
]


def test_a_broken_folder_is_one_line(folder, tmp_path, capsys):
    for number, (files, message) in enumerate(BROKEN):
        broken = tmp_path / str(number)
        shutil.copytree(folder, broken)
        for name, content in files.items():
            whole = (broken / name).read_bytes() if (broken / name).exists() else b""
            if content is None:
                (broken / name).unlink()
            else:
                (broken / name).write_bytes(content.encode() if isinstance(content, str) else whole[:-content])
        with pytest.raises(SystemExit) as exit:
            convert.main([str(broken), "--workdir", str(tmp_path / "run")])
        error = capsys.readouterr().err
        said = [line for line in error.splitlines() if not line.startswith("importing jax")]
        assert exit.value.code == 2 and len(said) == 1 and message in said[0] and str(broken) in said[0], error
        assert not (tmp_path / "run").exists()


def test_folders_in_use_are_refused(folder, tmp_path, capsys):
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("")
    convert.main([str(folder), "--workdir", str(tmp_path / "run")])
    run, new = str(tmp_path / "run"), str(tmp_path / "new")
    for flags, message in (
        ([run, "--workdir", new], f"{run}: is a run's folder, with no weights of the hub's format; write those with"),
        (
            ["--to-hf", "--workdir", str(folder), "--out", new],
            f"--workdir {folder}: holds a llama's weights, not a run",
        ),
        ([str(folder), "--workdir", str(used)], f"--workdir {used}: is not empty; give a new folder"),
        ([str(folder), "--workdir", str(used / "file")], f"--workdir {used / 'file'}: is a file; give a new folder"),
        (["--to-hf", "--workdir", str(tmp_path / "run"), "--out", str(used)], f"--out {used}: is not empty; give"),
        (["--to-hf", "--workdir", str(tmp_path / "run"), "--out", str(folder)], f"--out {folder}: is not empty; give"),
    ):
        with pytest.raises(SystemExit):
            convert.main(flags)
        assert message in capsys.readouterr().err
    assert [path.name for path in used.iterdir()] == ["file"]
