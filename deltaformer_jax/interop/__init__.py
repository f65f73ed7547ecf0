"""Weights in and out: models of flash-linear-attention and transformers, as the Hugging Face hub stores them."""

from deltaformer_jax.interop.layer import load_layer, save_layer
from deltaformer_jax.interop.load import load_pretrained
from deltaformer_jax.interop.save import save_pretrained

__all__ = ["load_layer", "load_pretrained", "save_layer", "save_pretrained"]
