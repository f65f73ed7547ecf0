"""The papers' tables and figures, and comparisons: `python -m deltaformer_jax.reproduce NAME --out DIR`."""
