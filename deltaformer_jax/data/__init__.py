"""Corpora, tokenizers, packing and batches. jax is imported only when the first batch is made."""

from deltaformer_jax.data.batches import batches, count_batches
from deltaformer_jax.data.build import prepare_corpus, stdlib_corpus
from deltaformer_jax.data.corpus import Corpus, Split, load_corpus
from deltaformer_jax.data.mixture import Mixture, has_loss_mask, load_data
from deltaformer_jax.data.task_data import TaskData, is_task
from deltaformer_jax.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    PieceTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    pretrained_tokenizer,
    train_bpe,
)

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "Mixture",
    "PieceTokenizer",
    "Split",
    "StreamDecoder",
    "TaskData",
    "Tokenizer",
    "batches",
    "count_batches",
    "has_loss_mask",
    "is_task",
    "load_corpus",
    "load_data",
    "load_tokenizer",
    "prepare_corpus",
    "pretrained_tokenizer",
    "stdlib_corpus",
    "train_bpe",
]
