"""Generating text with a model: sampling tokens with its cache, and turning them into text as they come.

`generate` and `stream` continue any number of prompts with continuous batching. The module `generate.py` holds what
continues all prompts in step, and stays importable: `from deltaformer_jax.decoding.generate import generate_batch`.
"""

# The module of this name is imported before the function takes its place as the package's attribute.
import deltaformer_jax.decoding.generate  # noqa: F401  isort: skip
from deltaformer_jax.decoding.chosen.rules import Evicted, Streaming
from deltaformer_jax.decoding.continuous import generate, stream
from deltaformer_jax.decoding.requests import Completion, Piece

__all__ = ["Completion", "Evicted", "Piece", "Streaming", "generate", "stream"]
