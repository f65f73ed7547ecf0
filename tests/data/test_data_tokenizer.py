"""Tokenizers: exact round trips, bytes per token, streaming that never shows half a character, clear errors."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaformer_jax.data import ByteTokenizer, load_tokenizer, train_bpe

TEXTS = [f"def function_{i}(self, value):\n    return self.value_{i} + value  # größer 日本 🙂\n" for i in range(40)]
BPE = train_bpe(TEXTS, 320)
BOTH = pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@BOTH
@settings(max_examples=100)
@given(text=text)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids and all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@BOTH
@settings(max_examples=100)
@given(data=st.data())
def test_stream_shows_whole_characters_and_the_same_text(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.end() == tokenizer.decode(ids)


@BOTH
def test_stream_waits_for_the_end_of_a_character(tokenizer):
    text = "a🙂é日"
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(parts) == text and "�" not in "".join(parts) and stream.end() == ""


def test_stream_ends_an_unfinished_character():
    stream = ByteTokenizer().stream()
    assert stream.push(0xF0) == "" and stream.push(0x9F) == "" and stream.end() == "�"
    assert stream.push(ord("x")) == "x"


def test_bytes():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.kind) == (257, 256, "bytes")
    assert tokenizer.encode("é") == [0xC3, 0xA9] and tokenizer.decode([0x61, 256, 0x62]) == "ab"
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [0] and tokenizer.token_bytes.dtype == np.int32


def test_bpe_joins_bytes_and_keeps_end_of_text_to_itself():
    assert BPE.vocab_size == 320 and BPE.kind == "bpe"
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    ids = BPE.encode("<|endoftext|>")
    assert BPE.eot not in ids and BPE.decode(ids) == "<|endoftext|>" and BPE.decode([BPE.eot]) == ""


def test_bpe_is_the_same_in_another_process_with_other_threads(tmp_path):
    BPE.save(tmp_path / "here.json")
    program = (
        "import sys, json; from deltaformer_jax.data import train_bpe;"
        "train_bpe(json.load(open(sys.argv[1])), 320).save(sys.argv[2])"
    )
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    arguments = [sys.executable, "-c", program, str(tmp_path / "texts.json"), str(tmp_path / "there.json")]
    subprocess.run(arguments, check=True, env={**os.environ, "RAYON_NUM_THREADS": "1"})
    assert (tmp_path / "there.json").read_bytes() == (tmp_path / "here.json").read_bytes()


@BOTH
def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert type(loaded) is type(tokenizer) and loaded.hash == tokenizer.hash and loaded.eot == tokenizer.eot
    assert loaded.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_hashes_tell_tokenizers_apart():
    assert len({ByteTokenizer().hash, BPE.hash, train_bpe(TEXTS, 319).hash}) == 3


def test_a_file_without_end_of_text_gets_one_more_id(tmp_path):
    content = json.loads(BPE.file_text)
    content["added_tokens"] = []
    content["model"]["vocab"] = {t: i - 1 for t, i in content["model"]["vocab"].items() if t != "<|endoftext|>"}
    (tmp_path / "t.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.eot == 319 and tokenizer.vocab_size == 320
    assert tokenizer.decode(tokenizer.encode("größer")) == "größer"


def test_special_tokens_of_a_file_have_no_bytes_and_added_words_have_theirs(tmp_path):
    encoder = tokenizers.Tokenizer.from_str(BPE.file_text)
    encoder.add_special_tokens(["<|pad|>"])
    encoder.add_tokens(["größer"])
    encoder.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.eot == BPE.eot and tokenizer.vocab_size == 322
    assert tokenizer.token_bytes[[320, 321]].tolist() == [0, len("größer".encode())]
    assert tokenizer.encode("größer") == [321] and tokenizer.decode([321, 320]) == "größer"


def test_errors(tmp_path):
    def written(name, content):
        (tmp_path / name).write_text(content)
        return tmp_path / name

    with pytest.raises(FileNotFoundError, match=r"none\.json: no such tokenizer"):
        load_tokenizer(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is a folder"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"bad\.json: not a tokenizer file"):
        load_tokenizer(written("bad.json", "{"))
    with pytest.raises(ValueError, match=r"other\.json: neither"):
        load_tokenizer(written("other.json", "{}"))
    with pytest.raises(ValueError, match=r"model\.json: not a tokenizer\.json"):
        load_tokenizer(written("model.json", '{"model": 3}'))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str()
    with pytest.raises(ValueError, match=r"words\.json: not a byte-level BPE"):
        load_tokenizer(written("words.json", words))
    few = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    few.decoder = tokenizers.decoders.ByteLevel()
    with pytest.raises(ValueError, match=r"few\.json: lacks tokens for 255"):
        load_tokenizer(written("few.json", few.to_str()))
    with pytest.raises(ValueError, match="bpe size 256 is too small: at least 257"):
        train_bpe(TEXTS, 256)
    with pytest.raises(ValueError, match="token id 257 is outside"):
        ByteTokenizer().decode([257])
    for tokenizer in (ByteTokenizer(), BPE):
        with pytest.raises(UnicodeEncodeError):
            tokenizer.encode("\ud800")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32"])
def test_ids_of_every_integer_type_are_decoded(dtype):
    assert ByteTokenizer().decode(np.array([104, 105], dtype)) == "hi"
    assert ByteTokenizer().decode(jnp.array([104, 105], dtype)) == "hi"
