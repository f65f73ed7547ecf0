"""Changes of a trained model: layers measured and removed. Pure functions of a config and its parameters."""

from deltaformer_jax.surgery.influence import block_influence
from deltaformer_jax.surgery.layers import remove_layers

__all__ = ["block_influence", "remove_layers"]
