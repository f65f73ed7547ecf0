"""Experiments that reproduce the papers' tables and figures: `python -m deltaformer_jax.reproduce NAME --out DIR`."""
