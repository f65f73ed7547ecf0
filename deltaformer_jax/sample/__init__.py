"""The program that lets a run's model write on from prompts: __main__.py says how."""

from deltaformer_jax.sample.prompts import read_prompts

__all__ = ["read_prompts"]
