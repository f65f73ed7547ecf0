"""flash-linear-attention's hybrids: "attn" of a config names the layers that are softmax attention."""

from __future__ import annotations

from typing import Any

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.interop.fields import Fields
from deltaformer_jax.interop.kinds import misfits, unknown
from deltaformer_jax.interop.sources.base import layers, pattern, setting

# The epsilon of its attention's qk-norm, whatever norm_eps is.
QK_NORM_EPSILON = 1e-5


def attention(heads: int, given: dict[str, Any]) -> dict[str, Any]:
    """The fields of a softmax attention layer, from a config with fla's names."""
    taken = dict(
        num_heads=heads,
        num_kv_heads=given.get("num_kv_heads") or heads,
        qkv_bias=bool(given.get("qkv_bias")),
        qk_norm=bool(given.get("qk_norm")),
        rope_base=float(given.get("rope_theta") or 10_000.0),
        window=given.get("window_size") or 0,
    )
    return taken | (dict(qk_norm_epsilon=QK_NORM_EPSILON) if taken["qk_norm"] else {})


def _unfit_attn(part: dict[str, Any], common: dict[str, Any], seen: set[int]) -> list[str]:
    """What is wrong with an "attn". It has no qk_norm: the layers that fla makes of it never have one. seen: the layers
    of those before it, to which its own are added."""
    wrong = misfits(part, "attn.") or [
        f"attn.{name}: missing" for name in ("layers", "num_heads") if not part.get(name)
    ]
    if not wrong and max(part["layers"]) >= common["num_layers"]:
        wrong = [f"attn.layers = {part['layers']!r}: the layers are 0 to {common['num_layers'] - 1}"]
    if not wrong:
        layers, heads, width = part["layers"], part["num_heads"], common["d_model"]
        if width % heads:
            wrong += [f"attn.num_heads = {heads}: must divide hidden_size = {width}"]
        if len({*layers} - seen) < len(layers):
            wrong += [f"attn.layers = {layers!r}: names a layer twice"]
        seen |= {*layers}
    return wrong + unknown(part, "layers num_heads num_kv_heads qkv_bias window_size rope_theta", "attn.")


def hybrid(fields: Fields, common: dict[str, Any], mixer: str, own: dict[str, Any]) -> ModelConfig:
    """The model whose layers are `mixer`, but for those that "attn" says are softmax attention."""
    given = fields.take("attn", None)
    if not given:
        fields.finish()
        return ModelConfig(mixers=(mixer,), **common, **own)
    entries = [Mixer(mixer)] * common["num_layers"]
    seen: set[int] = set()
    for part in given if isinstance(given, list) else [given]:
        if wrong := _unfit_attn(part, common, seen):
            fields.refuse("; ".join(wrong))
            continue
        taken = {k: v for k, v in attention(part["num_heads"], part).items() if v}
        width = common["d_model"] // part["num_heads"]
        one = Mixer("softmax_attention", head_dim=width, conv_size=0, output_gate="off", **taken)
        for n in part["layers"]:
            entries[n] = one
    fields.finish()
    if Mixer(mixer) not in entries:
        own = {}  # a config refuses the fields of a mixer that it does not have
    return ModelConfig(mixers=pattern(entries), **common, **own)


def say_hybrid(config: ModelConfig) -> dict[str, Any]:
    every = layers(config)
    alike: dict[Mixer, list[int]] = {}  # the layers of each kind of softmax attention
    for n, mixer in enumerate(every):
        if mixer.name == "softmax_attention":
            alike.setdefault(mixer, []).append(n)
    if not alike or (len(alike) == 1 and len(next(iter(alike.values()))) == len(every)):
        return {"attn": None}
    parts = [_say_attention(config, one, numbers) for one, numbers in alike.items()]
    return {"attn": parts[0] if len(parts) == 1 else parts}


def _say_attention(config: ModelConfig, one: Mixer, numbers: list[int]) -> dict[str, Any]:
    return dict(
        layers=numbers,
        num_heads=setting(config, one, "num_heads"),
        num_kv_heads=setting(config, one, "num_kv_heads"),
        qkv_bias=setting(config, one, "qkv_bias"),
        window_size=setting(config, one, "window") or None,
        rope_theta=setting(config, one, "rope_base"),
    )
