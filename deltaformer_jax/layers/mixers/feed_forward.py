"""The feed-forward layer of a block: an entry of `model.mixers` may have its own."""

from __future__ import annotations

from flax import nnx

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.layers.feed_forward import FEED_FORWARDS, Experts
from deltaformer_jax.layers.feed_forward.shift_editor import ShiftEditor
from deltaformer_jax.layers.feed_forward.sizes import expert_width, hidden_width
from deltaformer_jax.layers.mixers.build import FIELDS, block_setting

# Fields of ModelConfig that one kind of feed-forward layer alone reads; an entry of `model.mixers` may have its own.
READ_BY = {
    "memory": ("feed_forward_similarity",),
    "moe": (
        *("num_experts", "experts_per_token", "shared_experts", "expert_dim", "router", "renormalise_experts"),
        "expert_pool",
    ),
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
        width, _ = expert_width_of(config, mixer), more.pop("expert_dim")
    made = FEED_FORWARDS[name]
    try:
        return made(config.d_model, width, output_scale=output_scale, dtype=config.compute_dtype, rngs=rngs, **more)
    except ValueError as error:  # its message begins with the argument's name, which is also the field's name
        raise ValueError(f"model.{error}") from None


def build_shift_editor(config: ModelConfig, mixer: str | Mixer, *, rngs: nnx.Rngs) -> ShiftEditor | None:
    """The editor of the input of the feed-forward layer beside `mixer`, or None."""
    rank = block_setting(config, mixer, "ffn_shift_rank")
    return ShiftEditor(config.d_model, rank, dtype=config.compute_dtype, rngs=rngs) if rank else None


def expert_width_of(config: ModelConfig, mixer: str | Mixer) -> int:
    """The hidden width of the experts beside `mixer`."""
    setting = lambda name: block_setting(config, mixer, name)
    experts = setting("experts_per_token") + setting("shared_experts")
    return expert_width(setting("expert_dim"), feed_forward_width(config, mixer), experts)


def build_pool(config: ModelConfig, *, output_scale: float, rngs: nnx.Rngs) -> Experts | None:
    """The experts that all layers share with `expert_pool`, or None."""
    if not (config.expert_pool and (mixers := _with_experts(config))):
        return None
    width = expert_width_of(config, mixers[0])
    return Experts(config.d_model, width, config.num_experts, output_scale=output_scale, rngs=rngs)


def _with_experts(config: ModelConfig) -> list[str | Mixer]:
    """The entries of `model.mixers` beside which there are experts."""
    return [mixer for mixer in config.mixers if block_setting(config, mixer, "feed_forward") == "moe"]


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
    of_experts = _with_experts(config)
    for name in ("num_experts", "expert_pool"):
        if any(block_setting(config, mixer, name) != getattr(config, name) for mixer in of_experts):
            raise ValueError(
                f"model.{name}: is one for all layers of experts; set the field, not an entry of model.mixers"
            )
    widths = sorted({expert_width_of(config, mixer) for mixer in of_experts})
    if config.expert_pool and len(widths) > 1:
        raise ValueError(f"model.expert_pool: layers that share experts need one width; they have {widths}")
