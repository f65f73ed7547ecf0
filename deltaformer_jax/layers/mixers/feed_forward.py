"""The feed-forward layer of a block: an entry of `model.mixers` may have its own."""

from __future__ import annotations

from flax import nnx

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.layers.feed_forward import FEED_FORWARDS
from deltaformer_jax.layers.feed_forward.sizes import hidden_width
from deltaformer_jax.layers.mixers.build import block_setting


def feed_forward_width(config: ModelConfig, mixer: str | Mixer) -> int:
    """The hidden width of the feed-forward layer beside `mixer`."""
    setting = lambda name: block_setting(config, mixer, name)
    return hidden_width(setting("mlp_dim"), config.d_model, setting("feed_forward"))


def build_feed_forward(config: ModelConfig, mixer: str | Mixer, *, output_scale: float, rngs: nnx.Rngs) -> nnx.Module:
    """The feed-forward layer beside `mixer`, an entry of `model.mixers`, which may have its own."""
    setting = lambda name: block_setting(config, mixer, name)
    name, more = setting("feed_forward"), {}
    if name == "memory":
        more["feed_forward_similarity"] = setting("feed_forward_similarity")
    width = feed_forward_width(config, mixer)
    made = FEED_FORWARDS[name]
    return made(config.d_model, width, output_scale=output_scale, dtype=config.compute_dtype, rngs=rngs, **more)
