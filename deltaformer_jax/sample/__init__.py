"""The program that continues prompts with a run's model; its usage is in __main__.py."""

from deltaformer_jax.sample.prompts import read_prompts

__all__ = ["read_prompts"]
