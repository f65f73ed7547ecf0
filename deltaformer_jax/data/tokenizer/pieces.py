"""Tokenizers of pieces with byte fallback, as SentencePiece makes them: BPE (Llama 2, Mistral, Gemma) and Unigram.

A piece is written with "▁" for a space. A character without a piece becomes its UTF-8 bytes, the pieces <0x00> to
<0xFF>. Token i then stands for a fixed string of bytes, as in byte-level BPE. Two things need care:

  "▁" in a text     would come back as a space; it is encoded as its three bytes
  "<0x41>", "<s>"   in a text would be taken for the piece of that name by some models; it is cut after its first
                    character, so that no piece can match it
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from deltaformer_jax.data.byte_level import byte_exact, check_probe, parts_of
from deltaformer_jax.data.tokenizer.base import EOT_NAMES, Tokenizer, read_encoder, slices, special_tokens_of
from deltaformer_jax.data.tokenizer.prefix import ALWAYS, IF_NONE

SPACE = "▁"  # U+2581
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTE_IN_TEXT = r"<0x[0-9A-F]{2}>"
_BLOCK_CHARACTERS = 2**16
_LONGEST_WORD = 2**20
_SPACE_OFF = "the space before a text"
_PRE_TOKENIZERS = ("Metaspace", "Digits", "Punctuation", "Split")
_USE = "use the file of a byte-level BPE or of one with byte fallback such as Llama 2's, or --tokenizer bpe:SIZE"


def is_of_pieces(content: dict[str, Any]) -> bool:
    """True if the content of a tokenizer.json is of this kind, whether or not it can be used."""
    model = content.get("model")
    if not isinstance(model, dict):
        return False
    byte_level = '"ByteLevel"' in json.dumps(content.get("decoder"))
    return model.get("type") == "Unigram" or (model.get("byte_fallback") is True and not byte_level)


class PieceTokenizer(Tokenizer):
    """BPE or Unigram with byte fallback, from the text of a Hugging Face tokenizer.json.

    End-of-text is the first of EOT_NAMES among the special tokens of the file, or else a new id after the last one. The
    space that such files put before a text is switched off (`switched_off` says so), since a text must have the bytes
    of its tokens: begin a text with a space to get the same ids. Raises ValueError, naming `where`, for a file without
    a token for each byte, or with a component that changes texts.
    """

    def __init__(self, file_text: str, where: str = "tokenizer"):
        read_encoder(file_text, where)  # its own errors first
        content, switched_off = _exact(json.loads(file_text), where)
        encoder = read_encoder(json.dumps(content), where)
        encoder.encode_special_tokens = True
        added = encoder.get_added_tokens_decoder()
        vocabulary = encoder.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=0) + 1
        if size > len(vocabulary) + 2**20:
            raise ValueError(
                f"{where}: has ids up to {size - 1:,} for only {len(vocabulary):,} tokens; use another file"
            )
        specials = {token.content: i for i, token in added.items() if token.special}
        eot = next((specials[name] for name in EOT_NAMES if name in specials), size)
        unknown = _unknown(content["model"], encoder)
        self._spaced = _spaced(content)
        pieces, self._byte_ids = [b""] * max(size, eot + 1), [-1] * 256
        for token, i in vocabulary.items():
            if token in specials or i == unknown:
                continue
            if byte := _BYTE.fullmatch(token):
                self._byte_ids[int(byte[1], 16)] = i
                pieces[i] = bytes([int(byte[1], 16)])
            else:
                pieces[i] = (token.replace(SPACE, " ") if self._spaced else token).encode()
        if missing := self._byte_ids.count(-1):
            raise ValueError(
                f"{where}: lacks tokens <0x00> .. <0xFF> for {missing} of the 256 bytes, so it would lose characters "
                f"that it has no piece for; {_USE}"
            )
        super().__init__("pieces", pieces, eot, file_text)
        self.special_tokens = special_tokens_of(added)
        self.switched_off = tuple(switched_off)
        spaces = {"normalizer Prepend": ALWAYS, "pre-tokenizer Metaspace": IF_NONE}
        self.space_before = next((s for name, s in spaces.items() if f"{_SPACE_OFF} ({name})" in switched_off), "")
        self._encoder = encoder
        names = [name for name in [*specials, *vocabulary] if vocabulary[name] == unknown or name in specials]
        self._names = self._taken_by_name(set(names), unknown)
        words = [token.content for token in added.values() if not token.special]
        # Between a character and a space after it a text may be cut, unless a piece has both.
        self._joins = bool(content["model"].get("ignore_merges")) or any(
            " " in piece.lstrip(b" ").decode("utf-8", "replace") for piece in pieces
        )
        probes = [*words, *list(specials)[:50], "<0x41>", "<0xE2>", f"{SPACE}{SPACE}x {SPACE}"]
        check_probe(lambda text: self.decode_bytes(self.encode(text)), where, probes)

    def encode_stream(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of the concatenation of `parts`, which is encoded in blocks of some ten thousand characters.

        A block ends before a space that follows another character. No piece reaches over such a place, so the tokens
        are those of the whole text. Exception: if there is no such place in _LONGEST_WORD characters, or if the
        vocabulary has pieces that reach over it, a block ends after that many characters.
        """
        rest, made = "", False
        for block in slices(parts, _BLOCK_CHARACTERS):
            block.encode("utf-8")  # raises at a lone surrogate, at which the library would panic
            rest += block
            cut = 0 if self._joins or len(rest) < _BLOCK_CHARACTERS else _before_a_space(rest)
            if not cut and len(rest) >= _LONGEST_WORD:
                cut = len(rest)
            if cut:
                yield self._ids(rest[:cut])
                rest, made = rest[cut:], True
        if rest or not made:
            yield self._ids(rest)

    def _ids(self, text: str) -> np.ndarray:
        ids: list[int] = []
        for i, part in enumerate(text.split(SPACE) if self._spaced else [text]):
            if i:
                ids += [self._byte_ids[byte] for byte in SPACE.encode()]
            start = 0
            for match in self._names.finditer(part) if self._names else ():
                ids += self._encoder.encode(part[start : match.start() + 1], add_special_tokens=False).ids
                start = match.start() + 1
            ids += self._encoder.encode(part[start:], add_special_tokens=False).ids
        return np.array(ids, np.int64)

    def _taken_by_name(self, names: set[str], unknown: int | None) -> re.Pattern[str] | None:
        """Finds the places in a text where the model would take a name for a token that stands for something else."""
        ids_of = lambda text: self._encoder.encode(text, add_special_tokens=False).ids
        empty = {i for i in range(self.vocab_size) if not self.pieces[i]}
        taken = [re.escape(name) for name in sorted(names) if len(name) > 1 and empty & set(ids_of(name))]
        if self._byte_ids[0x41] in ids_of("<0x41>"):
            taken.append(_BYTE_IN_TEXT)
        return re.compile(f"(?={'|'.join(taken)})") if taken else None


def _exact(content: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """As `byte_exact`: (`content` without what can be switched off, the names of that). Raises ValueError by name."""
    model = content["model"]
    if not model.get("byte_fallback"):
        raise ValueError(
            f'{where}: its model {model.get("type")} has no byte fallback ("byte_fallback": true), so it would lose '
            f"characters that it has no piece for; {_USE}"
        )
    normalizers, pre_tokenizers = parts_of(content, "normalizer"), parts_of(content, "pre_tokenizer")
    content, off = byte_exact({**content, "normalizer": None, "pre_tokenizer": None}, where)
    kept = []
    for part in normalizers:
        if part["type"] == "NFC":
            off.append("normalizer NFC")
        elif part["type"] == "Prepend" and part.get("prepend") == SPACE:
            off.append(f"{_SPACE_OFF} (normalizer Prepend)")
        elif part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == SPACE:
            kept.append(part)
        else:
            raise ValueError(f"{where}: its normalizer {part['type']} changes the text; {_USE}")
    content["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    split = []
    for part in pre_tokenizers:
        known = part["type"] in _PRE_TOKENIZERS and part.get("behavior") != "Removed"
        if part["type"] == "Split":
            known &= "String" in part["pattern"]
        if part["type"] == "Metaspace":
            known &= part.get("replacement") == SPACE
            if part.get("prepend_scheme", "always") != "never" or part.get("add_prefix_space"):
                off.append(f"{_SPACE_OFF} (pre-tokenizer Metaspace)")
            part = {
                "type": "Metaspace",
                "replacement": SPACE,
                "prepend_scheme": "never",
                "split": part.get("split", True),
            }
        if not known:
            raise ValueError(f"{where}: its pre-tokenizer {part['type']} drops, changes or looks back; {_USE}")
        split.append(part)
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": split} if split else None
    return content, off


def _spaced(content: dict[str, Any]) -> bool:
    """True if pieces have "▁" where a text has a space."""
    kinds = {part["type"] for name in ("normalizer", "pre_tokenizer") for part in parts_of(content, name)}
    return bool(kinds & {"Replace", "Metaspace"})


def _unknown(model: dict[str, Any], encoder: Any) -> int | None:
    """The id of the token for unknown characters, which byte fallback never needs."""
    if model["type"] == "Unigram":
        return model.get("unk_id")
    return encoder.token_to_id(model["unk_token"]) if model.get("unk_token") else None


def _before_a_space(text: str) -> int:
    """The last place between a character and a space after it, 0 if there is none."""
    end = len(text)
    while (place := text.rfind(" ", 0, end)) > 0:
        if text[place - 1] != " ":
            return place
        end = place
    return 0
