"""The feed-forward layer of a block: an entry of `model.mixers` may have its own."""

from __future__ import annotations

from flax import nnx

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.layers.feed_forward import FEED_FORWARDS
from deltaformer_jax.layers.feed_forward.sizes import expert_width, hidden_width
from deltaformer_jax.layers.mixers.build import FIELDS, block_setting

# Fields of ModelConfig that one kind of feed-forward layer alone reads; an entry of `model.mixers` may have its own.
READ_BY = {
    "memory": ("feed_forward_similarity",),
    "moe": ("num_experts", "experts_per_token", "shared_experts", "expert_dim", "router", "renormalise_experts"),
}
# Fields that only the loss of a model with experts reads.
OF_THE_LOSS = ("balance_loss", "router_z_loss")


def feed_forward_width(config: ModelConfig, mixer: str | Mixer) -> int:
    """The hidden width of the feed-forward layer beside `mixer`."""
    setting = lambda name: block_setting(config, mixer, name)
    return hidden_width(setting("mlp_dim"), config.d_model, setting("feed_forward"))


def build_feed_forward(config: ModelConfig, mixer: str | Mixer, *, output_scale: float, rngs: nnx.Rngs) -> nnx.Module:
    """The feed-forward layer beside `mixer`, an entry of `model.mixers`, which may have its own."""
    setting = lambda name: block_setting(config, mixer, name)
    name, width = setting("feed_forward"), feed_forward_width(config, mixer)
    more = {field: setting(field) for field in READ_BY[name]} if name in READ_BY else {}
    if name == "moe":
        width = expert_width(more.pop("expert_dim"), width, setting("experts_per_token") + setting("shared_experts"))
    made = FEED_FORWARDS[name]
    try:
        return made(config.d_model, width, output_scale=output_scale, dtype=config.compute_dtype, rngs=rngs, **more)
    except ValueError as error:  # its message begins with the argument's name, which is also the field's name
        raise ValueError(f"model.{error}") from None


def has_experts(config: ModelConfig) -> bool:
    """Whether any layer is a mixture of experts."""
    return any(block_setting(config, mixer, "feed_forward") == "moe" for mixer in config.mixers)


def check_feed_forwards(config: ModelConfig) -> None:
    """Raise ValueError for a field that was changed and that no feed-forward layer of the model reads."""
    used = {block_setting(config, mixer, "feed_forward") for mixer in config.mixers}
    for layer, fields in {**READ_BY, "moe": (*READ_BY["moe"], *OF_THE_LOSS)}.items():
        for name in fields:
            value = getattr(config, name)
            if layer not in used and value != FIELDS[name].default:
                raise ValueError(
                    f"model.{name} = {value!r}: no layer has model.feed_forward = {layer!r}, which alone reads it"
                )
    numbers = {
        block_setting(config, mixer, "num_experts")
        for mixer in config.mixers
        if block_setting(config, mixer, "feed_forward") == "moe"
    }
    if len(numbers) > 1:
        raise ValueError(f"model.num_experts: must be one for all layers of experts; there are {sorted(numbers)}")
