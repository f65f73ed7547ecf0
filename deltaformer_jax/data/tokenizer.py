"""Text to token ids and back: raw bytes, or byte-level BPE.

Both are byte-level: token i stands for a fixed string of bytes, the bytes of a text are the concatenation of its
tokens' bytes, and one more token, end-of-text (`eot`), stands between documents and is never made from text.
"""

from __future__ import annotations

import abc
import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from deltaformer_jax.host.paths import expand

# The names under which published byte-level tokenizers keep their end-of-text token, in order of preference.
EOT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "</s>", "<eos>", "<s>")
SMALLEST_BPE = 257  # 256 bytes and end-of-text; merges start above
_BYTES_FILE = json.dumps({"deltaformer_jax": {"tokenizer": "bytes", "version": 1}}, sort_keys=True) + "\n"


class Tokenizer(abc.ABC):
    """What both kinds share: `pieces[i]` is the bytes of token i, b"" for end-of-text and other special tokens.

    Attributes:
      kind: "bytes" or "bpe".
      vocab_size: number of ids; every id is in [0, vocab_size). Rounding it up is the model's business.
      eot: id of the token before the first and after the last token of a document.
      token_bytes: int32 [vocab_size], len(pieces[i]): what bits per byte divides by.
      hash: sha256, hexadecimal, of the file `save` writes.
    """

    def __init__(self, kind: str, pieces: list[bytes], eot: int, file_text: str):
        self.kind = kind
        self.vocab_size = len(pieces)
        self.eot = eot
        self.pieces = pieces
        self.token_bytes = np.array([len(piece) for piece in pieces], np.int32)
        self.file_text = file_text
        self.hash = hashlib.sha256(file_text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without end-of-text. A lone surrogate in `text` raises UnicodeEncodeError."""
        return self.encode_array(text).tolist()

    @abc.abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, as an integer array [number of tokens]."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; end-of-text has none. ValueError for an id outside [0, vocab_size)."""
        pieces = []
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the tokenizer's vocabulary of {self.vocab_size}")
            pieces.append(self.pieces[i])
        return b"".join(pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file that `load_tokenizer` reads."""
        Path(path).write_text(self.file_text, encoding="utf-8", newline="\n")


class StreamDecoder:
    """Token ids in, text out, as early as possible and never half a character.

    `push(id)` returns the characters that id completes (often one, "" in the middle of a character), `end()` what is
    left. Together they are `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([int(token)]))

    def end(self) -> str:
        """What an unfinished character becomes: U+FFFD, or "". The decoder is then as new."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


class ByteTokenizer(Tokenizer):
    """Token i is the byte i; end-of-text is 256. vocab_size 257."""

    def __init__(self):
        super().__init__("bytes", [bytes([i]) for i in range(256)] + [b""], 256, _BYTES_FILE)

    def encode_array(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)


class TaskVocabulary(Tokenizer):
    """The `vocab_size` ids of a synthetic task: numbers without text. `encode` raises ValueError."""

    def __init__(self, vocab_size: int):
        content = {"deltaformer_jax": {"tokenizer": "task", "version": 1, "vocab_size": vocab_size}}
        super().__init__("task", [b""] * vocab_size, 0, json.dumps(content, sort_keys=True) + "\n")

    def encode_array(self, text: str) -> np.ndarray:
        raise ValueError(
            "the tokens of a synthetic task are numbers, not text: its runs neither write on from prompts nor read "
            "text; python -m deltaformer_jax.evaluate scores them"
        )


class BPETokenizer(Tokenizer):
    """Byte-level BPE from the text of a Hugging Face tokenizer.json (GPT-2, Llama 3, Qwen and our own).

    End-of-text is the first of EOT_NAMES among the file's special tokens, or else one new id after its last.
    Special tokens' names in a text are encoded as ordinary text. ValueError, naming `where`, for a file that is not
    a byte-level BPE.
    """

    def __init__(self, file_text: str, where: str = "tokenizer"):
        # Hugging Face's library is imported where it is used: byte tokenizers need none of it.
        import tokenizers

        try:
            encoder = tokenizers.Tokenizer.from_str(file_text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{where}: not a tokenizer.json of Hugging Face tokenizers: {error}") from None
        if not isinstance(encoder.model, tokenizers.models.BPE) or not _is_byte_level(file_text):
            raise ValueError(
                f"{where}: not a byte-level BPE tokenizer (model BPE, decoder ByteLevel); "
                'use "bytes", "bpe:SIZE" or the file of one such as GPT-2\'s or Llama 3\'s'
            )
        encoder.no_truncation()
        encoder.no_padding()
        encoder.encode_special_tokens = True
        added = encoder.get_added_tokens_decoder()
        specials = {token.content: i for i, token in added.items() if token.special}
        vocabulary = encoder.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values()) + 1
        eot = next((specials[name] for name in EOT_NAMES if name in specials), size)
        pieces = [b""] * max(size, eot + 1)
        to_byte = {character: byte for byte, character in _byte_characters().items()}
        for token, i in vocabulary.items():
            if i in added:
                pieces[i] = b"" if added[i].special else token.encode()
                continue
            try:
                pieces[i] = bytes(to_byte[character] for character in token)
            except KeyError:
                raise ValueError(f"{where}: token {i}, {token!r}, is not byte-level") from None
        if missing := set(range(256)) - {piece[0] for piece in pieces if len(piece) == 1}:
            raise ValueError(f"{where}: lacks tokens for {len(missing)} of the 256 bytes, whose text it would lose")
        super().__init__("bpe", pieces, eot, file_text)
        self._encoder = encoder

    def encode_array(self, text: str) -> np.ndarray:
        text.encode("utf-8")  # raises at a lone surrogate, where the library would panic
        blocks = [self._encoder.encode(block, add_special_tokens=False).ids for block in _blocks(text)]
        return np.concatenate([np.array(block, np.int64) for block in blocks])


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Byte-level BPE of `vocab_size` ids learnt from `texts`: all 256 bytes, end-of-text, then merges.

    The result depends on the texts alone, not on threads. Few texts may allow fewer merges than asked for: the
    vocabulary is then smaller. ValueError for vocab_size < 257.
    """
    check_bpe_size(vocab_size)
    import tokenizers

    encoder = tokenizers.Tokenizer(tokenizers.models.BPE())
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT_NAMES[0]],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    encoder.train_from_iterator(texts, trainer)
    return BPETokenizer(encoder.to_str())


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a file that `Tokenizer.save` wrote, or of a Hugging Face byte-level BPE's tokenizer.json.

    FileNotFoundError or ValueError names the file.
    """
    try:
        text = Path(expand(path)).read_bytes().decode("utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such tokenizer file (nor "bytes" or "bpe:SIZE")') from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; give the tokenizer.json file in it") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer file (JSON): {error}") from None
    if text == _BYTES_FILE:
        return ByteTokenizer()
    if task := _task_vocabulary(content):
        return task
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{path}: neither this package's byte tokenizer nor a Hugging Face tokenizer.json")
    return BPETokenizer(text, str(path))


def _task_vocabulary(content: object) -> TaskVocabulary | None:
    own = content.get("deltaformer_jax") if isinstance(content, dict) else None
    size = own.get("vocab_size") if isinstance(own, dict) and own.get("tokenizer") == "task" else None
    return TaskVocabulary(size) if isinstance(size, int) and size > 0 else None


def bpe_size(spec: str) -> int | None:
    """SIZE of a "bpe:SIZE", checked; None for other specs."""
    if not spec.startswith("bpe:"):
        return None
    try:
        size = int(spec[4:])
    except ValueError:
        raise ValueError(f'tokenizer {spec!r}: SIZE in "bpe:SIZE" must be a whole number') from None
    check_bpe_size(size)
    return size


def check_bpe_size(size: int) -> None:
    if size < SMALLEST_BPE:
        raise ValueError(f"bpe size {size} is too small: at least {SMALLEST_BPE} (256 bytes and end-of-text)")


_BLOCK_CHARACTERS = 2**20
# A single line break before a letter: published byte-level tokenizers never join what comes before and after it.
_CUT = re.compile(r"(?<=\S\n)(?=\w)")


def _blocks(text: str) -> Iterator[str]:
    """`text` in parts of about a million characters: the library needs some hundred bytes of memory per token."""
    start = 0
    while cut := _CUT.search(text, start + _BLOCK_CHARACTERS):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def _is_byte_level(file_text: str) -> bool:
    decoder = json.loads(file_text).get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def _byte_characters() -> dict[int, str]:
    """Byte-level BPE's printable stand-in for each byte: itself where Latin-1 prints it, else U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
