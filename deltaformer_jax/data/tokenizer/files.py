"""Finds out which tokenizer is in a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from deltaformer_jax.data.tokenizer.base import BYTES_FILE, ByteTokenizer, TaskVocabulary, Tokenizer
from deltaformer_jax.data.tokenizer.bpe import BPETokenizer
from deltaformer_jax.data.tokenizer.pieces import PieceTokenizer, is_of_pieces
from deltaformer_jax.data.tokenizer.pretrained import pretrained_ends, pretrained_prefix
from deltaformer_jax.host.paths import expand


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a file that `Tokenizer.save` wrote, or in a tokenizer.json of Hugging Face tokenizers.

    Of these byte-level BPE can be used, and BPE and Unigram with byte fallback.

    Raises FileNotFoundError or ValueError that names the file.
    """
    try:
        text = Path(expand(path)).read_bytes().decode("utf-8-sig")
        content = json.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path}: no such tokenizer file (nor "bytes" or "bpe:SIZE")') from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; give the tokenizer.json file in it") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a tokenizer file (JSON): {error}") from None
    if text == BYTES_FILE:
        return ByteTokenizer()
    if task := _task_vocabulary(content):
        return task
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{path}: neither this package's byte tokenizer nor a Hugging Face tokenizer.json")
    return (PieceTokenizer if is_of_pieces(content) else BPETokenizer)(text, str(path))


def pretrained_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """The tokenizer.json in a folder of the Hugging Face hub's format, with the folder's own `prefix` and `ends`.

    tokenizer = pretrained_tokenizer("Llama-3.2-1B")
    generate(model, ["Hello"], tokenizer=tokenizer, max_tokens=20)  # after <|begin_of_text|>

    Raises as `load_tokenizer`.
    """
    folder = Path(expand(folder))
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    tokenizer.prefix = pretrained_prefix(folder, tokenizer)
    tokenizer.ends |= set(pretrained_ends(folder, tokenizer))
    return tokenizer


def _task_vocabulary(content: object) -> TaskVocabulary | None:
    own = content.get("deltaformer_jax") if isinstance(content, dict) else None
    size = own.get("vocab_size") if isinstance(own, dict) and own.get("tokenizer") == "task" else None
    return TaskVocabulary(size) if isinstance(size, int) and size > 0 else None
