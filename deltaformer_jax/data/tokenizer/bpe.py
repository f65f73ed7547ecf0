"""Byte-level BPE: read from a tokenizer.json, or learnt from texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

import numpy as np

from deltaformer_jax.data.byte_level import byte_exact, check_probe, is_byte_level
from deltaformer_jax.data.tokenizer.base import (
    BLOCK_CHARACTERS,
    EOT_NAMES,
    Tokenizer,
    read_encoder,
    slices,
    special_tokens_of,
)
from deltaformer_jax.data.tokenizer.prefix import IF_NONE

SMALLEST_BPE = 257  # 256 bytes and end-of-text; merges start above


class BPETokenizer(Tokenizer):
    """Byte-level BPE from the text of a Hugging Face tokenizer.json (GPT-2, Llama 3, Qwen, or made by `train_bpe`).

    End-of-text is the first of EOT_NAMES among the special tokens of the file, or else a new id after the last one.
    Names of special tokens in a text are encoded as ordinary text. Components of the file that would change texts are
    switched off (`switched_off` names them) or refused, see byte_level.py. Raises ValueError, naming `where`, for a
    file that is not a byte-level BPE.
    """

    def __init__(self, file_text: str, where: str = "tokenizer"):
        # Imported here, since byte tokenizers do not need this library.
        import tokenizers

        encoder = read_encoder(file_text, where)
        content = json.loads(file_text)
        if not isinstance(encoder.model, tokenizers.models.BPE) or not is_byte_level(content):
            raise ValueError(
                f"{where}: not a byte-level BPE tokenizer (model BPE, decoder ByteLevel); "
                'use "bytes", "bpe:SIZE" or the file of one such as GPT-2\'s or Llama 3\'s'
            )
        exact, switched_off = byte_exact(content, where)
        if exact != content:
            encoder = read_encoder(json.dumps(exact), where)
        encoder.encode_special_tokens = True
        added = encoder.get_added_tokens_decoder()
        specials = {token.content: i for i, token in added.items() if token.special}
        vocabulary = encoder.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=0) + 1
        if size > len(vocabulary) + 2**20:
            raise ValueError(
                f"{where}: has ids up to {size - 1:,} for only {len(vocabulary):,} tokens; use another file"
            )
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
            raise ValueError(f"{where}: lacks tokens for {len(missing)} of the 256 bytes, so it would lose text")
        super().__init__("bpe", pieces, eot, file_text)
        self.special_tokens = special_tokens_of(added)
        self.switched_off = tuple(switched_off)
        self.space_before = IF_NONE if "add_prefix_space" in switched_off else ""
        self._encoder = encoder
        words = [token.content for token in added.values() if not token.special]
        self._margin = max([_MARGIN_BYTES, *(2 * len(word.encode()) for word in words)])
        check_probe(lambda text: self.decode_bytes(self.encode(text)), where, words)

    def encode_stream(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of the concatenation of `parts`. The text is encoded in blocks, since the library needs some
        hundred bytes of memory per token.

        The blocks do not change the tokens, for these reasons:

        * A block ends between two words of the pre-tokenizer, and BPE joins nothing across words.
        * The pre-tokenizer works from left to right and decides a word by its characters and the one after it. So words
          that end at least `_margin` bytes before the end of a block are the words of the whole text.
        * A pre-tokenizer may look back. So what follows the cut is also encoded without the text before it. If its
          tokens then differ, the block is cut one word earlier.

        Exception: a word of more than _LONGEST_WORD characters, for which BPE would take a gigabyte, is cut.
        """
        rest, enough, made = "", _BLOCK_CHARACTERS, False
        for block in slices(parts, _BLOCK_CHARACTERS):
            block.encode("utf-8")  # raises at a lone surrogate, at which the library would panic
            rest += block
            if len(rest) < enough:
                continue
            encoding = self._encoder.encode(rest, add_special_tokens=False)
            ids = np.array(encoding.ids, np.int64)
            cut, left = self._cut(rest, ids, np.array(encoding.word_ids))
            if cut or len(rest) >= _LONGEST_WORD:
                yield ids[: cut or len(ids)]
                rest, enough, made = left, _BLOCK_CHARACTERS, True
            else:
                enough = 2 * len(rest)
        if rest or not made:
            yield self._ids(rest)

    def _ids(self, text: str) -> np.ndarray:
        return np.array(self._encoder.encode(text, add_special_tokens=False).ids, np.int64)

    def _cut(self, text: str, ids: np.ndarray, words: np.ndarray) -> tuple[int, str]:
        """(how many tokens of a block are certain to be those of the whole text, the text after them), or (0, "")."""
        ends = np.cumsum(self.token_bytes[ids])
        certain = np.searchsorted(ends, ends[-1] - self._margin, side="right")
        (starts,) = np.nonzero(np.diff(words))  # token i ends a word
        for i in reversed(starts[:-2][starts[:-2] < certain][-_TRIES:]):
            left = text.encode("utf-8")[ends[i] :].decode("utf-8")
            if np.array_equal(self._ids(left), ids[i + 1 :]):
                return int(i) + 1, left
        return 0, ""


def train_bpe(texts: Iterable[str | Iterable[str]], vocab_size: int) -> BPETokenizer:
    """Learns byte-level BPE of `vocab_size` ids (256 bytes, end-of-text, merges) from `texts`, each whole or in parts.

    The result depends on the texts alone, not on the number of threads. If the texts do not allow enough merges, the
    vocabulary is smaller. Raises ValueError for vocab_size < 257.
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
    encoder.train_from_iterator(_learning_slices(texts), trainer)
    return BPETokenizer(encoder.to_str())


def bpe_size(spec: str) -> int | None:
    """SIZE of "bpe:SIZE"; None for any other spec. Raises ValueError for an invalid SIZE."""
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


_BLOCK_CHARACTERS = BLOCK_CHARACTERS
_LONGEST_WORD = 2**20
_MARGIN_BYTES = 2**10
_TRIES = 32
_LEARNING_CHARACTERS = 2**16
_WORD_BEGINS = re.compile(r"(?<=\w)(?=[ \t\r\n])")


def _learning_slices(texts: Iterable[str | Iterable[str]]) -> Iterator[str]:
    """`texts` in slices of about 64 thousand characters, which bound the memory: the library collects 256 of its inputs
    before it counts words.

    The pre-tokenizer of `train_bpe` begins a word at every white space after a letter or digit. So slices that begin
    there do not change the counts. Words of more than _LONGEST_WORD characters are cut.
    """
    for text in texts:
        rest = ""
        for part in slices([text] if isinstance(text, str) else text):
            rest += part
            start = 0
            while len(rest) - start > _LEARNING_CHARACTERS:
                if found := _WORD_BEGINS.search(rest, start + _LEARNING_CHARACTERS):
                    yield rest[start : found.start()]
                    start = found.start()
                elif len(rest) - start > _LONGEST_WORD:
                    yield rest[start:]
                    start = len(rest)
                else:
                    break
            rest = rest[start:]
        yield rest


def _byte_characters() -> dict[int, str]:
    """The printable character by which byte-level BPE writes each byte: Latin-1 if printable, else U+0100 and up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
