"""Which tokenizer.json files keep the promise: the bytes of a text are its tokens' bytes, the same at every call.

What is done with a component that breaks the promise depends on what the vocabulary was learnt from:

  switched off, and said   BPE dropout, which is for training; a prefix space; the normalizer NFC, since nearly all text
                           is NFC already; `lstrip` and `rstrip` of added tokens. Without them the vocabulary serves as
                           well, and the ids of nearly every text stay the same.
  refused by name          every other normalizer (lower case, NFKC, stripped accents, ...): the vocabulary knows only
                           changed text. A pre-tokenizer that drops or replaces characters; a model that marks the
                           ends of words.

A text of many kinds of characters is encoded last: what these lists don't know is found by what it does.
"""

from __future__ import annotations

import json
from typing import Any

_SWITCHED_OFF_NORMALIZERS = ("NFC",)
_PRE_TOKENIZERS = ("ByteLevel", "Split", "Digits", "Punctuation", "UnicodeScripts", "FixedLength")
_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}

# Composed and decomposed accents, ligatures, full width, case, ends of lines of every kind, runs of spaces, numbers.
PROBE = (
    "  Ünïcode cafe\u0301 café ﬁn ＡＢＣ ① İstanbul ǅ ß ½ 日本語。한국어 한 \U0001f600\u200d\U0001f4bb "
    "\u00a0\u2028\u0085x\ndon't I'LL 1234567 3.14\t\tif(x!=y){z+=[];}\r\n\r\n\n   end\x00\x1f\ufeff\ufffd\ufffe "
    " <|endoftext|> a  <s>b</s> \n "
)


def byte_exact(content: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """`content` of a tokenizer.json without what can be switched off, and the names of that.

    ValueError, naming `where`, the component and the fix, for what can't be.
    """
    content, off = json.loads(json.dumps(content)), []
    kept = []
    for part in _parts(content, "normalizer"):
        if part["type"] in _SWITCHED_OFF_NORMALIZERS:
            off.append(f"normalizer {part['type']}")
        elif part["type"] == "ByteLevel":
            kept.append(part)
        else:
            raise ValueError(
                f"{where}: its normalizer {part['type']} changes the text, so that bits per byte would be of another; "
                'learn a tokenizer with --tokenizer bpe:SIZE, or take a file whose "normalizer" is null'
            )
    content["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for part in _parts(content, "pre_tokenizer"):
        if part["type"] not in _PRE_TOKENIZERS or part.get("behavior") == "Removed":
            raise ValueError(
                f"{where}: its pre-tokenizer {part['type']} drops or changes characters; use a byte-level BPE file "
                "such as GPT-2's or Llama 3's, or --tokenizer bpe:SIZE"
            )
        if part.get("add_prefix_space"):
            part["add_prefix_space"] = False
            off.append("add_prefix_space")
    model = content["model"]
    if model.get("dropout"):
        model["dropout"] = None
        off.append("dropout")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"{where}: its model's {name} {model[name]!r} adds to the text; use a byte-level BPE file")
    for token in content.get("added_tokens") or []:
        for side in ("lstrip", "rstrip"):
            # Special tokens are never looked for in a text, so that theirs takes nothing.
            if token.get(side) and not token.get("special"):
                token[side] = False
                off.append(f"{side} of the added token {token['content']!r}")
    # It would only add special tokens and shorten offsets, and neither is asked for.
    content["post_processor"] = content["truncation"] = content["padding"] = None
    return content, off


def check_probe(encode_bytes: Any, where: str, added: list[str]) -> None:
    """Raise ValueError if `encode_bytes`, str -> bytes of its tokens, changes a text of many kinds of characters."""
    for text in (PROBE, PROBE.strip(), "x", *(f"a {token} b{token}\n" for token in added[:100])):
        if encode_bytes(text) != text.encode("utf-8"):
            shown = text if len(text) < 40 else text[:40] + "..."
            raise ValueError(
                f"{where}: the bytes of its tokens are not those of the text (of {shown!r}, for one); use a byte-level "
                "BPE file such as GPT-2's or Llama 3's, or --tokenizer bpe:SIZE"
            )


def is_byte_level(content: dict[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(content, "decoder"))


def _parts(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The components of a kind, those of Sequences in their place."""
    found, waiting = [], [content.get(name)]
    while waiting:
        part = waiting.pop(0)
        if part and part.get("type") == "Sequence":
            waiting = [*part[_PARTS[name]], *waiting]
        elif part:
            found.append(part)
    return found
