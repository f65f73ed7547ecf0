"""Checks that a tokenizer.json is byte-exact: a text has the bytes of its tokens, the same at every call.

A component of the file that breaks this rule is treated in one of two ways:

  switched off, with a warning   BPE dropout, which is for training; a prefix space; the normalizer NFC, since nearly
                                 all text is NFC already; `lstrip` and `rstrip` of added tokens. The vocabulary works as
                                 well without them, and the ids of nearly every text stay the same.
  refused by name                every other normalizer (lower case, NFKC, stripped accents, ...), since the vocabulary
                                 was learnt from changed text; a pre-tokenizer that drops or replaces characters; a
                                 model that marks the ends of words.

At the end a text of many kinds of characters is encoded, which finds components that these lists do not know.
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
    """(`content` of a tokenizer.json without the components that can be switched off, their names).

    Raises ValueError, naming `where`, the component and the fix, for a component that cannot be switched off.
    """
    content, off = json.loads(json.dumps(content)), []
    kept = []
    for part in parts_of(content, "normalizer"):
        if part["type"] in _SWITCHED_OFF_NORMALIZERS:
            off.append(f"normalizer {part['type']}")
        elif part["type"] == "ByteLevel":
            kept.append(part)
        else:
            raise ValueError(
                f"{where}: its normalizer {part['type']} changes the text, so bits per byte would be those of another "
                'text; learn a tokenizer with --tokenizer bpe:SIZE, or take a file whose "normalizer" is null'
            )
    content["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    for part in parts_of(content, "pre_tokenizer"):
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
            # Special tokens are never searched for in a text, so their lstrip and rstrip have no effect.
            if token.get(side) and not token.get("special"):
                token[side] = False
                off.append(f"{side} of the added token {token['content']!r}")
    # The post-processor only adds special tokens and shortens offsets. Neither is used.
    content["post_processor"] = content["truncation"] = content["padding"] = None
    return content, off


def check_probe(encode_bytes: Any, where: str, added: list[str]) -> None:
    """Raise ValueError if `encode_bytes`, str -> bytes of its tokens, changes one of several test texts."""
    for text in (PROBE, PROBE.strip(), "x", *(f"a {token} b{token}\n" for token in added[:100])):
        if encode_bytes(text) != text.encode("utf-8"):
            shown = text if len(text) < 40 else text[:40] + "..."
            raise ValueError(
                f"{where}: the bytes of its tokens are not those of the text (for example {shown!r}); use a byte-level "
                "BPE file such as GPT-2's or Llama 3's, or --tokenizer bpe:SIZE"
            )


def is_byte_level(content: dict[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in parts_of(content, "decoder"))


def parts_of(content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The components of a kind, in order, with each Sequence replaced by its components."""
    found, waiting = [], [content.get(name)]
    while waiting:
        part = waiting.pop(0)
        if part and part.get("type") == "Sequence":
            waiting = [*part[_PARTS[name]], *waiting]
        elif part:
            found.append(part)
    return found
