"""Conversations: rendered by a chat template, tokenized, with a mask of the tokens that the assistant says."""

from deltaformer_jax.data.chat.encoding import Encoded, Encoder
from deltaformer_jax.data.chat.format import CHAT_FILE, ChatFormat
from deltaformer_jax.data.chat.loading import load_format, pretrained_format

__all__ = ["CHAT_FILE", "ChatFormat", "Encoded", "Encoder", "load_format", "pretrained_format"]
