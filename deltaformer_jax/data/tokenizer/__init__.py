"""Text to token ids and back: raw bytes, byte-level BPE, or pieces with byte fallback (Llama 2, Mistral)."""

from deltaformer_jax.data.tokenizer.base import ByteTokenizer, StreamDecoder, TaskVocabulary, Tokenizer
from deltaformer_jax.data.tokenizer.bpe import BPETokenizer, bpe_size, train_bpe
from deltaformer_jax.data.tokenizer.files import load_tokenizer, pretrained_tokenizer
from deltaformer_jax.data.tokenizer.pieces import PieceTokenizer
from deltaformer_jax.data.tokenizer.prefix import Prefix
from deltaformer_jax.data.tokenizer.pretrained import pretrained_prefix

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "PieceTokenizer",
    "Prefix",
    "StreamDecoder",
    "TaskVocabulary",
    "Tokenizer",
    "bpe_size",
    "load_tokenizer",
    "pretrained_prefix",
    "pretrained_tokenizer",
    "train_bpe",
]
