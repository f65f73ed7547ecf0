"""The bytes of a text are its tokens' bytes, whatever the tokenizer's file says; blocks of a long text don't show."""

import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaformer_jax.data import ByteTokenizer, load_tokenizer, prepare_corpus, train_bpe
from deltaformer_jax.data.prepare import main
from deltaformer_jax.data.tokenizer import BPETokenizer
from deltaformer_jax.data.tokenizer import bpe as tokenizer_module

TEXTS = ["hello world, cafe\u0301 2024\n  x  = 1234567\r\n日本 don't\n\n" * 50]
PLAIN = json.loads(train_bpe(TEXTS, 330).file_text)
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def changed(**components):
    content = copy.deepcopy(PLAIN)
    for name, value in components.items():
        place = content
        *parents, last = name.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    return content


def added(content, **properties):
    token = {"id": 330, "content": content, "single_word": False, "lstrip": False, "rstrip": False, "special": False}
    return changed(added_tokens=[*PLAIN["added_tokens"], {**token, "normalized": True, **properties}])


def pre_tokenizers(*patterns):
    return changed(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [*({**SPLIT, "pattern": {"Regex": pattern}} for pattern in patterns), LEVEL],
        }
    )


SWITCHED_OFF = {
    "NFC": (changed(normalizer={"type": "NFC"}), "normalizer NFC"),
    "NFC in a sequence": (
        changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
        "normalizer NFC",
    ),
    "prefix space": (changed(pre_tokenizer__add_prefix_space=True), "add_prefix_space"),
    "dropout": (changed(model__dropout=0.5), "dropout"),
    "lstrip": (added("world", lstrip=True), "lstrip of the added token 'world'"),
    "rstrip": (added("world", rstrip=True), "rstrip of the added token 'world'"),
}
REFUSED = {
    "lower case": changed(normalizer={"type": "Lowercase"}),
    "NFKC": changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "NFC"}]}),
    "NFD": changed(normalizer={"type": "NFD"}),
    "Strip": changed(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
    "StripAccents": changed(normalizer={"type": "StripAccents"}),
    "Prepend": changed(normalizer={"type": "Prepend", "prepend": "_"}),
    "Replace": changed(normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "_"}),
    "Split": changed(
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{**SPLIT, "pattern": {"String": " "}, "behavior": "Removed"}, LEVEL],
        }
    ),
    "WhitespaceSplit": changed(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, LEVEL]}
    ),
    "Metaspace": changed(pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}),
    "end_of_word_suffix": changed(model__end_of_word_suffix="</w>"),
    "the bytes of its tokens": changed(pre_tokenizer=None),
}


@pytest.mark.parametrize("case", SWITCHED_OFF)
def test_what_changes_texts_is_switched_off_and_said(case):
    content, name = SWITCHED_OFF[case]
    tokenizer = BPETokenizer(json.dumps(content), "t.json")
    assert tokenizer.switched_off == (name,)
    for text in ("cafe\u0301", "hello world , " * 30, "a world  world\n" * 3):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids == tokenizer.encode(text)
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.file_text == json.dumps(content)  # a corpus made with it keeps its hash


@pytest.mark.parametrize("case", REFUSED)
def test_what_changes_texts_is_refused_by_name(case, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps(REFUSED[case]))
    with pytest.raises(ValueError) as caught:
        load_tokenizer(tmp_path / "t.json")
    name = {"lower case": "Lowercase"}.get(case, case)
    assert "t.json: " in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


def test_what_changes_nothing_is_taken():
    specials = added("<|pad|>", special=True, lstrip=True)
    for content in (PLAIN, specials, changed(model__dropout=0.0), added("wor", normalized=False)):
        assert BPETokenizer(json.dumps(content)).switched_off == ()


def test_a_byte_order_mark_before_a_tokenizer_file(tmp_path):
    (tmp_path / "t.json").write_text("\ufeff" + json.dumps(PLAIN), encoding="utf-8")
    assert load_tokenizer(tmp_path / "t.json").hash == BPETokenizer(json.dumps(PLAIN)).hash


def nodes(content, path=()):
    yield path
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            if "vocab" not in path and "merges" not in path:
                yield from nodes(content[key], (*path, key))


SMALL = json.loads(train_bpe(["ab"], 258).file_text)
PATHS = [path for path in nodes(SMALL) if path]


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from(PATHS), st.sampled_from([None, 1, "x", [], {}, [1], {"type": "NFC"}, True, "gone"])),
        min_size=1,
        max_size=2,
    )
)
def test_a_tokenizer_file_with_any_fault_is_named(tmp_path_factory, changes):
    content = copy.deepcopy(SMALL)
    for path, value in changes:
        place = content
        try:
            for key in path[:-1]:
                place = place[key]
            if value == "gone":
                del place[path[-1]]
            else:
                place[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
    file = tmp_path_factory.getbasetemp() / "t.json"
    file.write_text(json.dumps(content))
    try:
        tokenizer = load_tokenizer(file)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
    else:
        assert tokenizer.decode(tokenizer.encode("ab é<|endoftext|>")) == "ab é<|endoftext|>"


# GPT-2's, Llama 3's (Qwen's but for the digits), DeepSeek's in several steps, one that looks back, no splits.
PRE_TOKENIZERS = {
    "gpt2": PLAIN,
    "llama3": pre_tokenizers(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    ),
    "deepseek": pre_tokenizers(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\s+$", r"[一-龥]+", r"\p{N}"),
    "looks back": pre_tokenizers(r"(?<=o)w|(?<=\n) +|\p{N}{1,3}"),
    "one word": pre_tokenizers(),
}
ENCODERS = {name: BPETokenizer(json.dumps(content), name) for name, content in PRE_TOKENIZERS.items()}
PIECES = ["hello", " world", "\n", "\r\n", " ", "   ", "1234567", "日本", "don't", "!!", "\t", "e\u0301", "=", "\u2028"]


@pytest.mark.parametrize("name", ENCODERS)
@given(data=st.data())
def test_blocks_do_not_show(name, data):
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=80)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    tokenizer = ENCODERS[name]
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_BLOCK_CHARACTERS", 24)
        patch.setattr(tokenizer, "_margin", 8)
        blocks = list(tokenizer.encode_stream(parts))
    assert np.concatenate(blocks).tolist() == whole


def test_long_texts_are_encoded_in_blocks(monkeypatch):
    for end in ("\n", "\r\n", " "):  # lines of either kind, and one line
        text = ("hello world" + end) * 400
        whole = ENCODERS["gpt2"].encode(text)
        monkeypatch.setattr(tokenizer_module, "_BLOCK_CHARACTERS", 64)
        monkeypatch.setattr(ENCODERS["gpt2"], "_margin", 16)
        blocks = list(ENCODERS["gpt2"].encode_stream([text]))
        assert len(blocks) > 30 and np.concatenate(blocks).tolist() == whole
        monkeypatch.undo()


def test_a_word_without_end_is_cut(monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_BLOCK_CHARACTERS", 64)
    monkeypatch.setattr(tokenizer_module, "_LONGEST_WORD", 256)
    text = "日本" * 1000
    blocks = list(ENCODERS["gpt2"].encode_stream([text]))
    assert len(blocks) == 8 and ENCODERS["gpt2"].decode(np.concatenate(blocks)) == text


def test_every_tokenizer_takes_parts():
    for tokenizer in (ByteTokenizer(), *ENCODERS.values()):
        for parts in ([], [""], ["hello ", "", "wörld"]):
            joined = np.concatenate([np.zeros(0, np.int64), *tokenizer.encode_stream(parts)])
            assert joined.tolist() == tokenizer.encode("".join(parts))


def test_dropout_makes_the_same_corpus_twice_and_says_that_it_is_off(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello world, " * 40)
    (tmp_path / "t.json").write_text(json.dumps(SWITCHED_OFF["dropout"][0]))
    flags = ["--tokenizer", str(tmp_path / "t.json"), "--eval_fraction", "0"]
    assert main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "one"), *flags]) == 0
    assert "t.json: switched off, so that a text has the bytes of its tokens: dropout" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="dropout"):
        again = prepare_corpus(tmp_path / "a.txt", tmp_path / "two", tokenizer=flags[1], eval_fraction=0)
    one = (tmp_path / "one" / "train-00000.array_record").read_bytes()
    assert (again.path / "train-00000.array_record").read_bytes() == one
