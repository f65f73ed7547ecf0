"""Conversations: rendered by a chat template, tokenized, with a mask of the tokens that the assistant says."""

from deltaformer_jax.data.chat.encoding import Encoded, Encoder
from deltaformer_jax.data.chat.format import ChatFormat
from deltaformer_jax.data.chat.loading import load_format

__all__ = ["ChatFormat", "Encoded", "Encoder", "load_format"]
