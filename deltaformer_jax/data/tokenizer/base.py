"""What every tokenizer has in common, and the one of raw bytes.

All kinds are byte-exact: token i stands for a fixed string of bytes, and the bytes of a text are the concatenation of
the bytes of its tokens. One more token, end-of-text (`eot`), separates documents and never results from encoding text.
"""

from __future__ import annotations

import abc
import codecs
import functools
import hashlib
import json
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deltaformer_jax.data.tokenizer.prefix import Prefix

# The names of the end-of-text token in published byte-level tokenizers, in order of preference.
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>", "<s>")
BYTES_FILE = json.dumps({"deltaformer_jax": {"tokenizer": "bytes", "version": 1}}, sort_keys=True) + "\n"


class SpecialToken(NamedTuple):
    """id. lstrip, rstrip: whether white space before, or after, the token belongs to it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class Tokenizer(abc.ABC):
    """The base class of all kinds. `pieces[i]` is the bytes of token i, b"" for end-of-text and other special tokens.

    Attributes:
      kind: "bytes", "bpe", "pieces" or "task".
      vocab_size: number of ids; every id is in [0, vocab_size). The model may round it up.
      eot: id of end-of-text, the token before the first and after the last token of a document.
      token_bytes: int32 [vocab_size], len(pieces[i]), used for bits per byte.
      hash: sha256, hexadecimal, of the file that `save` writes.
      switched_off: names of components of the file that change texts or are random, and so are not used.
      special_tokens: name -> SpecialToken, the tokens that `encode` never makes and `encode_with_specials` does.
      space_before: the space that the file's own rules put before a text, which `encode` does not (`Prefix.space`).
      prefix: what a model reads before a text. End-of-text, unless `pretrained_tokenizer` or a run that was imported
        sets it.
      ends: the ids that end a text: end-of-text, and those of an imported model.
    """

    switched_off: tuple[str, ...] = ()
    special_tokens: Mapping[str, SpecialToken] = types.MappingProxyType({})
    space_before = ""

    def __init__(self, kind: str, pieces: list[bytes], eot: int, file_text: str):
        self.kind = kind
        self.vocab_size = len(pieces)
        self.eot = eot
        self.prefix = Prefix((eot,), eot)
        self.ends = frozenset([eot])
        self.pieces = pieces
        self.token_bytes = np.array([len(piece) for piece in pieces], np.int32)
        self.file_text = file_text
        self.hash = hashlib.sha256(file_text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without end-of-text. A lone surrogate in `text` raises UnicodeEncodeError."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, as an integer array [number of tokens]."""
        arrays = list(self.encode_stream([text]))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def encode_text(self, text: str) -> list[int]:
        """As `encode`, after the space that the prefix may have: the ids of a text as the model knows its beginning."""
        return self.encode(self.prefix.spaced(text))

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of the prefix and of `text`, at least one."""
        return [*self.prefix.ids, *self.encode_text(text)] or [self.prefix.first]

    def encode_with_specials(self, text: str) -> np.ndarray:
        """As `encode_array`, but the name of a special token in `text` becomes that token, as in chat templates.

        As transformers does, white space is dropped on the sides where the token's `lstrip` and `rstrip` say so.
        """
        if not self.special_tokens:
            return self.encode_array(text)
        arrays, start = [], 0
        for match in self._special_names.finditer(text):
            if start < match.start():
                arrays.append(self.encode_array(text[start : match.start()]))
            arrays.append(np.array([self.special_tokens[match[0].strip()].id], np.int64))
            start = match.end()
        if start < len(text) or not arrays:
            arrays.append(self.encode_array(text[start:]))
        return np.concatenate(arrays)

    @functools.cached_property
    def _special_names(self) -> re.Pattern[str]:
        tokens = sorted(self.special_tokens.items(), key=lambda item: -len(item[0]))  # a longer name first
        space = lambda strip: r"\s*" if strip else ""
        names = (f"{space(token.lstrip)}{re.escape(name)}{space(token.rstrip)}" for name, token in tokens)
        return re.compile("|".join(names))

    @abc.abstractmethod
    def encode_stream(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of the concatenation of `parts`, in one or more arrays, in bounded memory."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; end-of-text has none. Raises ValueError for an id outside [0, vocab_size)."""
        pieces = []
        for i in map(int, ids):  # an element of a narrow array cannot be compared with the vocabulary's size
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the tokenizer's vocabulary of {self.vocab_size}")
            pieces.append(self.pieces[i])
        return b"".join(pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file that `load_tokenizer` reads."""
        Path(path).write_text(self.file_text, encoding="utf-8", newline="\n")


class StreamDecoder:
    """Decodes token ids that come one at a time. Returns text as early as possible, but never part of a character.

    `push(id)` returns the characters that this id completes, "" in the middle of a character. `end()` returns the rest.
    Their concatenation is `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([int(token)]))

    def end(self) -> str:
        """U+FFFD for an unfinished character, else "". Then resets the decoder."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class ByteTokenizer(Tokenizer):
    """Token i is the byte i; end-of-text is 256. vocab_size 257."""

    def __init__(self):
        super().__init__("bytes", [bytes([i]) for i in range(256)] + [b""], 256, BYTES_FILE)

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_stream(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        return map(self.encode_array, parts)


class TaskVocabulary(Tokenizer):
    """The `vocab_size` ids of a synthetic task, which stand for no text. `encode` raises ValueError."""

    def __init__(self, vocab_size: int):
        content = {"deltaformer_jax": {"tokenizer": "task", "version": 1, "vocab_size": vocab_size}}
        super().__init__("task", [b""] * vocab_size, 0, json.dumps(content, sort_keys=True) + "\n")

    def encode_stream(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        raise ValueError(
            "the tokens of a synthetic task are numbers, not text: a run on a task cannot continue prompts or read "
            "text; python -m deltaformer_jax.evaluate scores it"
        )


def read_encoder(file_text: str, where: str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(file_text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and its panics are not subclasses of it
        raise ValueError(f"{where}: not a tokenizer.json of Hugging Face tokenizers: {error}") from None


def special_tokens_of(added: Mapping[int, Any]) -> dict[str, SpecialToken]:
    """The special ones of the library's added tokens, without those whose name is white space."""
    return {
        token.content: SpecialToken(i, token.lstrip, token.rstrip)
        for i, token in added.items()
        if token.special and token.content == token.content.strip() and token.content
    }


BLOCK_CHARACTERS = 2**18


def slices(parts: Iterable[str], size: int = BLOCK_CHARACTERS) -> Iterator[str]:
    """`parts`, with those of more than `size` characters in slices."""
    for part in parts:
        for start in range(0, len(part), size):
            yield part[start : start + size]
