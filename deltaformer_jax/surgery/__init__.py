"""Changes of a trained model: layers measured, ranked and removed. Pure functions of a config and its parameters."""

from deltaformer_jax.surgery.influence import block_influence
from deltaformer_jax.surgery.layers import remove_layers
from deltaformer_jax.surgery.rankings import losses, measure, ranking
from deltaformer_jax.surgery.rope import rescale_rope
from deltaformer_jax.surgery.token_change import token_change

__all__ = ["block_influence", "losses", "measure", "ranking", "remove_layers", "rescale_rope", "token_change"]
