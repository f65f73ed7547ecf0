"""Tokenizers with byte fallback, BPE and Unigram: every text comes back; what would lose text is refused."""

import copy
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, trainers

from deltaformer_jax.data import load_tokenizer, pretrained_tokenizer, train_bpe
from deltaformer_jax.data.tokenizer import Prefix
from deltaformer_jax.data.tokenizer import pieces as module
from deltaformer_jax.data.tokenizer.pieces import PieceTokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIALS = ["<unk>", "<s>", "</s>"]
WORDS = "the cat sat on a mat and the dog ran to the old house in rain größer "
LLAMA = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


def added(names):
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return [{"id": i, "content": name, **plain} for i, name in enumerate(names)]


def bpe_file():
    """BPE as Llama 2 has it: no pre-tokenizer, spaces and the first one made by normalizers."""
    encoder = tokenizers.Tokenizer(models.BPE())
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[*SPECIALS, *BYTES], show_progress=False)
    encoder.train_from_iterator([WORDS] * 4, trainer)
    content = json.loads(encoder.to_str())
    content.update(LLAMA, pre_tokenizer=None, added_tokens=added(SPECIALS))
    content["model"].update(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return content


def unigram_file():
    ordinary = ["▁", *(f"▁{word}" for word in WORDS.split()), "at", "ing", *"abcdefghijklmnopqrstuvwxyz"]
    scores = [[piece, -2.0 - len(ordinary) / 10 + len(piece)] for piece in dict.fromkeys(ordinary)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added(SPECIALS),
        "normalizer": None,
        "pre_tokenizer": METASPACE,
        "post_processor": None,
        "decoder": METASPACE,
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "byte_fallback": True,
            "vocab": [[name, 0.0] for name in [*SPECIALS, *BYTES]] + scores,
        },
    }


FILES = {"bpe": bpe_file(), "unigram": unigram_file()}
TOKENIZERS = {name: PieceTokenizer(json.dumps(content)) for name, content in FILES.items()}
BOTH = pytest.mark.parametrize("kind", TOKENIZERS)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
hard = st.lists(
    st.sampled_from(["▁", " ", "  ", "<0x41>", "<0xE2>", "<s>", "</s>", "<unk>", "<", "the cat", "\n", "日本", "🙂"])
    | text,
    max_size=8,
).map("".join)


@BOTH
@settings(max_examples=200)
@given(text=hard)
def test_every_text_comes_back(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.end() == text


@BOTH
def test_a_character_of_several_tokens_is_shown_when_it_is_whole(kind):
    tokenizer = TOKENIZERS[kind]
    ids, stream = tokenizer.encode("🙂"), tokenizer.stream()
    assert len(ids) == 4 and [stream.push(i) for i in ids] == ["", "", "", "🙂"]


@BOTH
def test_the_ids_are_the_librarys_after_a_space(kind):
    """The file's own encoder puts a space before a text, and this one does not."""
    theirs = tokenizers.Tokenizer.from_str(json.dumps(FILES[kind]))
    for words in ("the cat sat", "a größer house 日本 in\nrain", "x  y"):
        assert TOKENIZERS[kind].encode(" " + words) == theirs.encode(words, add_special_tokens=False).ids
    assert len(TOKENIZERS[kind].encode(" the cat sat")) < 8  # pieces are used, not bytes
    assert any("space before a text" in name for name in TOKENIZERS[kind].switched_off)


@BOTH
def test_the_file_is_loaded_and_kept_byte_for_byte(kind, tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(FILES[kind], indent=2), encoding="utf-8")
    tokenizer = load_tokenizer(file)
    assert tokenizer.kind == "pieces" and tokenizer.pieces[tokenizer.special_tokens["</s>"].id] == b""
    assert tokenizer.eot == 2
    tokenizer.save(tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == file.read_bytes()


@BOTH
@pytest.mark.parametrize("longest", [2**20, 100])
def test_blocks_do_not_show(kind, longest, monkeypatch):
    tokenizer = TOKENIZERS[kind]
    draw = np.random.default_rng(0)
    words = [*WORDS.split(), "▁", "日本", " ", "   ", "\n", "<s>"]
    long = " ".join(draw.choice(words) for _ in range(400))
    whole = tokenizer.encode(long)
    monkeypatch.setattr(module, "_BLOCK_CHARACTERS", 50)
    monkeypatch.setattr(module, "_LONGEST_WORD", longest)
    blocks = list(tokenizer.encode_stream([long[:333], long[333:335], long[335:]]))
    assert len(blocks) > 20 and np.concatenate(blocks).tolist() == whole
    endless = "abc" * 500  # without a place to cut at
    assert tokenizer.decode(tokenizer.encode(endless)) == endless


def test_a_special_token_is_made_only_when_it_is_asked_for():
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.encode_with_specials("<s>the cat</s>").tolist() == [1, *tokenizer.encode("the cat"), 2]
    assert not {1, 2} & set(tokenizer.encode("<s>the cat</s>"))


def changed(kind, **parts):
    content = json.loads(json.dumps(FILES[kind]))
    for name, value in parts.items():
        if name.startswith("model__"):
            content["model"][name.removeprefix("model__")] = value
        else:
            content[name] = value
    return content


def without_a_byte():
    content = changed("unigram")
    content["model"]["vocab"][100][0] = "other"
    return content


REFUSED = {
    "no byte fallback": changed("unigram", model__byte_fallback=False),
    "normalizer Lowercase": changed("bpe", normalizer={"type": "Lowercase"}),
    "normalizer Replace": changed("bpe", normalizer={**LLAMA["normalizer"]["normalizers"][1], "content": "_"}),
    "pre-tokenizer WhitespaceSplit": changed("unigram", pre_tokenizer={"type": "WhitespaceSplit"}),
    "pre-tokenizer Metaspace": changed("unigram", pre_tokenizer={**METASPACE, "replacement": "_"}),
    "lacks tokens <0x00> .. <0xFF> for 1 of the 256 bytes": without_a_byte(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_lose_text_is_refused_with_the_reason(reason, tmp_path):
    file = tmp_path / "t.json"
    file.write_text(json.dumps(REFUSED[reason]), encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load_tokenizer(file)
    assert "t.json: " in str(caught.value) and reason in str(caught.value) and "\n" not in str(caught.value)


# What a model reads before a text: what its folder's own tokenizer puts there, or end-of-text.
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.fixture
def written(tmp_path):
    """written(content of tokenizer.json, tokenizer_config, config): (the tokenizer of that folder, the library's)"""

    def write(content, config=None, model=None):
        for name, said in (("tokenizer", content), ("tokenizer_config", config), ("config", model or {})):
            if said is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(said), encoding="utf-8")
        return pretrained_tokenizer(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))

    return write


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("processor", [TEMPLATE, {"type": "Sequence", "processors": [BYTE_LEVEL, TEMPLATE]}])
def test_prompts_are_what_the_files_own_rules_make(kind, processor, written):
    """Llama 2's and Mistral's: <s> and a space come before a text. The library's ids are the reference."""
    ours, theirs = written(copy.deepcopy(FILES[kind]) | {"post_processor": processor})
    for text in ("the cat sat", " the cat", "  x", "x  y", "größer\nrain", ""):
        assert ours.encode_prompt(text) == theirs.encode(text).ids
        assert ours.encode_text(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.prefix.elsewhere and ours.prefix.ids == (1,)
    assert Prefix.of(json.loads(json.dumps(ours.prefix.settings()))) == ours.prefix
    assert ours.encode("the cat") == TOKENIZERS[kind].encode("the cat")  # a corpus has no such space


def test_without_a_post_processor_the_config_decides(written):
    file = FILES["bpe"]
    added = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    cases = [
        (file, added, {}, (1,), 1),
        (file, added | {"add_bos_token": False}, {}, (), 1),
        (file | {"post_processor": TEMPLATE}, added | {"add_bos_token": False}, {}, (1,), 1),  # as transformers 5 does
        (file, {"eos_token": {"content": "</s>"}}, {"bos_token_id": 1}, (), 2),
        (file, {}, {"bos_token_id": 1}, (), 1),
        (file, {}, {"bos_token_id": 10**6}, (), 2),
        (file, added | {"trained_by": "deltaformer_jax"}, {}, (2,), 2),
        (file, added, {"model_type": "deltaformer_jax"}, (2,), 2),
    ]
    for content, config, model, ids, first in cases:
        tokenizer, _ = written(content, config, model)
        assert (tokenizer.prefix.ids, tokenizer.prefix.first) == (ids, first), (config, model)
        assert tokenizer.encode_prompt("") == list(ids or [first])


def test_a_tokenizer_by_itself_begins_with_end_of_text(tmp_path):
    own = train_bpe(["the cat. the dog. " * 50], 280)
    own.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode_prompt(" x") == [own.eot, *own.encode(" x")] and not loaded.prefix.elsewhere
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not JSON"):
        pretrained_tokenizer(tmp_path)
