"""Corpora on disk: whatever is missing, edited or damaged is refused by name; the standard library's."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import deltaformer_jax.data
from deltaformer_jax.data import ByteTokenizer, batches, load_corpus, prepare_corpus, stdlib_corpus, train_bpe
from deltaformer_jax.data.corpus import manifest_hash


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(30):
        (tmp_path / "in" / f"{i}.txt").write_text(f"document {i} " * 300)
    return prepare_corpus(tmp_path / "in", tmp_path / "out", eval_fraction=0.3).path


def test_loads_again_the_same(folder):
    one, two = load_corpus(folder), load_corpus(str(folder))
    assert one.hash == two.hash and one.manifest == two.manifest
    assert one.split("train").documents + one.split("eval").documents == 30
    with pytest.raises(ValueError, match="split 'valid' is not one of 'train', 'eval'"):
        one.split("valid")


def rewrite_manifest(folder, **changed):
    path = folder / "manifest.json"
    manifest = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({**manifest, "manifest_hash": manifest_hash(manifest)}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def edit(path, old, new):
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


DAMAGES = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), r"manifest\.json: missing, so .* is not a prepared"),
    "cut manifest": (lambda f: (f / "manifest.json").write_text('{"a'), r"manifest\.json: damaged"),
    "another's manifest": (lambda f: (f / "manifest.json").write_text("{}"), r"manifest\.json: not the manifest"),
    "edited manifest": (lambda f: edit(f / "manifest.json", '"tokens": ', '"tokens": 1'), "was edited"),
    "newer format": (lambda f: rewrite_manifest(f, format_version=99), r"format version 99, but this package reads 1"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json: no such tokenizer file"),
    "another tokenizer": (
        lambda f: train_bpe(["abcabc"], 258).save(f / "tokenizer.json"),
        r"tokenizer\.json: not the tokenizer that the corpus was made with",
    ),
    "edited tokenizer": (lambda f: edit(f / "tokenizer.json", "bytes", "words"), r"tokenizer\.json: neither"),
    "no lengths": (lambda f: (f / "eval_lengths.npy").unlink(), r"eval_lengths\.npy: missing"),
    "cut lengths": (lambda f: cut(f / "train_lengths.npy"), r"train_lengths\.npy: was changed or damaged"),
    "no shard": (lambda f: (f / "train-00000.array_record").unlink(), r"train-00000\.array_record: missing"),
    "cut shard": (lambda f: cut(f / "eval-00000.array_record"), r"eval-00000\.array_record: \d+ bytes where"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused(folder, damage):
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_corpus(folder)


def test_a_damaged_corpus_is_not_taken_for_made(folder, tmp_path):
    (folder / "train-00000.array_record").unlink()
    with pytest.raises(FileExistsError, match=r"holds a damaged corpus .*; delete it, or use --force"):
        prepare_corpus(tmp_path / "in", folder, eval_fraction=0.3)
    assert prepare_corpus(tmp_path / "in", folder, eval_fraction=0.3, force=True).split("train").documents > 0


def test_no_place_for_a_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder; make it with python -m deltaformer"):
        load_corpus(tmp_path / "none")


def test_flipped_bytes_in_a_shard_are_found_in_reading(folder):
    """Each byte of the records' part, every 97th flipped in its turn, either raises or changes no token."""
    sound = load_corpus(folder).split("eval")
    texts = [sound.read(i).tobytes() for i in range(sound.documents)]
    path = folder / "eval-00000.array_record"
    content = path.read_bytes()
    raised = 0
    for place in range(0, 5000, 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        try:
            split = load_corpus(folder).split("eval")
            assert [split.read(i).tobytes() for i in range(split.documents)] == texts
        except ValueError as error:
            assert "eval-00000.array_record: damaged" in str(error)
            raised += 1
    assert raised > 5


def test_damage_reaches_who_asks_for_batches(folder):
    path = folder / "train-00000.array_record"
    content = bytearray(path.read_bytes())
    content[64:4096] = bytes(4032)
    path.write_bytes(content)
    iterator = batches(load_corpus(folder), "train", sequence_length=64, batch_size=64, seed=0)
    with pytest.raises(ValueError, match=r"train-00000\.array_record: damaged"):
        for _ in range(20):
            next(iterator)


def test_standard_library(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    corpus = stdlib_corpus()
    splits = corpus.manifest["splits"]
    assert corpus.path.parent == tmp_path / "deltaformer_jax"
    assert 5e6 < splits["train"]["bytes"] < 2e7 and 5e4 < splits["eval"]["bytes"] < 2e6
    train, evaluation = corpus.split("train"), corpus.split("eval")
    texts = [corpus.tokenizer.decode(s.read(i)) for s in (train, evaluation) for i in range(s.documents)]
    assert Path(json.__file__).read_text(encoding="utf-8") in texts
    assert Path(os.__file__).read_text(encoding="utf-8") in texts
    assert not any("Python Character Mapping Codec" in text[:200] for text in texts)
    assert max(map(len, texts)) < 500_000
    assert stdlib_corpus().hash == corpus.hash and len(list(corpus.path.parent.iterdir())) == 1
    assert isinstance(corpus.tokenizer, ByteTokenizer)


def test_standard_library_by_two_processes_at_once(tmp_path):
    program = "from deltaformer_jax.data import stdlib_corpus; print(stdlib_corpus().hash)"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    hashes = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0] and len(hashes) == 1
    assert len(list((tmp_path / "deltaformer_jax").iterdir())) == 1


def test_standard_library_without_a_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="set XDG_CACHE_HOME to a folder you can write"):
        stdlib_corpus()


def test_standard_library_with_bad_tokenizers():
    with pytest.raises(FileNotFoundError, match=r'byte: no such tokenizer file \(nor "bytes" or "bpe:SIZE"\)'):
        stdlib_corpus("byte")
    with pytest.raises(ValueError, match="bpe size 3 is too small"):
        stdlib_corpus("bpe:3")


def test_data_imports_nothing_of_the_floors_above_and_no_jax():
    """argument_parser and host, of the floors below, import nothing but the standard library."""
    for path in Path(deltaformer_jax.data.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("jax", "flax")
                allowed = ("data.", "tasks.", "host.", "config.argument_parser.")
                assert not name.startswith("deltaformer_jax") or f"{name}.".startswith(
                    tuple(f"deltaformer_jax.{part}" for part in allowed)
                )
