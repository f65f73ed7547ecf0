"""Layers of models whose other parts have no equivalent here: mixtures of experts, latent attention, hyper-connections.

qwen3_next's gated delta rule and gated attention; the Kimi Delta Attention of kimi_linear, glm5_next and
bailing_hybrid. Read from transformers 5.24.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from deltaformer_jax.config import Mixer
from deltaformer_jax.interop.layouts import FROM_HEADS, LINEAR, VECTOR
from deltaformer_jax.interop.sources.fla import MEMORY
from deltaformer_jax.interop.sources.transformers import GATED_ATTENTION, QWEN_DELTA
from deltaformer_jax.interop.tables import Row

LINEAR_LAYER, FULL_LAYER = "linear_attention", "full_attention"
# fla's names of q, k, v, their convolutions and β, in another module; the bias of a convolution does not occur.
KDA = [
    *(row._replace(theirs=row.theirs.replace("attn.", "self_attn.", 1)) for row in MEMORY),
    Row("self_attn.f_a_proj.weight", "mixer.decay.down", LINEAR),
    Row("self_attn.f_b_proj.weight", "mixer.decay.up", LINEAR),
    Row("self_attn.A_log", "mixer.decay.log_rate", VECTOR),
    Row("self_attn.dt_bias", "mixer.decay.bias", VECTOR),
    Row("self_attn.g_a_proj.weight", "mixer.output.gate_down", LINEAR),
    Row("self_attn.g_b_proj.weight", "mixer.output.gate", LINEAR),
    Row("self_attn.o_norm.weight", "mixer.output.norm.norm.scale", VECTOR),
    Row("self_attn.o_proj.weight", "mixer.output.output", FROM_HEADS),
]


Tensors = dict[str, np.ndarray]


class Layer(NamedTuple):
    """One layer: its mixer, with every setting as an override, and its rows.

    prepare: what the tensors of a file must first become; restore: the inverse. shapes: those in a file where they are
    not those of the rows.
    """

    mixer: Mixer
    rows: list[Row]
    prepare: Callable[[Tensors], Tensors] = dict
    restore: Callable[[Tensors], Tensors] = dict
    shapes: Mapping[str, tuple[int, ...]] = {}


def qwen3_next(values: Mapping[str, Any], layer: int) -> Layer:
    kinds = values["layer_types"]
    norms = dict(norm_epsilon=values.get("rms_norm_eps", 1e-6), norm_gain="one_plus_scale")
    if kinds[layer] == FULL_LAYER:
        said = values.get("rope_parameters") or values.get("rope_scaling") or {}
        rope = dict(values) | {name: value for name, value in said.items() if value is not None}
        if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
            raise ValueError(f"config.json: rope_type = {kind!r}: only 'default' has an equivalent here")
        heads = dict(num_heads=values["num_attention_heads"], num_kv_heads=values["num_key_value_heads"])
        mixer = Mixer(
            "softmax_attention",
            head_dim=values["head_dim"],
            qk_norm=True,
            output_gate="on",
            rope_base=float(rope.get("rope_theta", 10_000.0)),
            rotary_fraction=float(rope.get("partial_rotary_factor", 0.25)),
            **heads,
            **norms,
        )
        return Layer(mixer, GATED_ATTENTION)
    keys, rows = values["linear_num_key_heads"], values["linear_num_value_heads"]
    sizes = values["linear_key_head_dim"], values["linear_value_head_dim"]
    mixer = Mixer(
        "gated_delta_net",
        num_heads=keys,
        num_value_heads=rows,
        head_dim=sizes[0],
        value_dim=sizes[1],
        conv_size=values.get("linear_conv_kernel_dim", 4),
        beta_bias=False,
        norm_epsilon=norms["norm_epsilon"],
    )
    return Layer(
        mixer,
        QWEN_DELTA,
        lambda tensors: _ungrouped(tensors, keys, rows, *sizes),
        lambda tensors: _grouped(tensors, keys, rows, *sizes),
    )


def _ungrouped(tensors: Tensors, keys: int, values: int, width: int, value_width: int) -> Tensors:
    """qwen3_next's projections, whose rows are [q, k, v, z] and [b, a] of one key head after the other, by type as
    qwen3_5 has them."""
    tensors, each = dict(tensors), values // keys
    rows = tensors.pop("linear_attn.in_proj_qkvz.weight")
    cuts = np.cumsum([width, width, each * value_width])
    q, k, v, z = np.split(rows.reshape(keys, -1, rows.shape[-1]), cuts, axis=1)
    flat = lambda x: x.reshape(-1, x.shape[-1])
    tensors["linear_attn.in_proj_qkv.weight"] = np.concatenate([flat(q), flat(k), flat(v)])
    tensors["linear_attn.in_proj_z.weight"] = flat(z)
    rows = tensors.pop("linear_attn.in_proj_ba.weight")
    b, a = np.split(rows.reshape(keys, 2 * each, rows.shape[-1]), 2, axis=1)
    return tensors | {"linear_attn.in_proj_b.weight": flat(b), "linear_attn.in_proj_a.weight": flat(a)}


def _grouped(tensors: Tensors, keys: int, values: int, width: int, value_width: int) -> Tensors:
    """The inverse of `_ungrouped`."""
    tensors = dict(tensors)
    by_head = lambda x: x.reshape(keys, -1, x.shape[-1])
    joined = lambda parts: np.concatenate(parts, axis=1).reshape(-1, parts[0].shape[-1])
    rows = tensors.pop("linear_attn.in_proj_qkv.weight")
    parts = np.split(rows, np.cumsum([keys * width, keys * width]))
    parts.append(tensors.pop("linear_attn.in_proj_z.weight"))
    gates = [tensors.pop(f"linear_attn.in_proj_{name}.weight") for name in "ba"]
    return tensors | {
        "linear_attn.in_proj_qkvz.weight": joined([by_head(part) for part in parts]),
        "linear_attn.in_proj_ba.weight": joined([by_head(gate) for gate in gates]),
    }


def _kda(values: Mapping[str, Any], heads: int, width: int, taps: int, epsilon: float = 1e-5, **own: Any) -> Mixer:
    """epsilon: what rms_norm_eps is if absent."""
    return Mixer(
        "kimi_delta_attention",
        num_heads=heads,
        head_dim=width,
        value_dim=width,
        conv_size=taps,
        beta_bias=False,
        norm_epsilon=values.get("rms_norm_eps", epsilon),
        **own,
    )


def _linear_config(values: Mapping[str, Any]) -> tuple[int, int, int, Mapping[str, Any]]:
    """(heads, width, taps, what else a released config says of its linear layers), by the names of either form."""
    said = values.get("linear_attn_config") or {}
    found = []
    for inside, outside in (("num_heads", "linear_num_heads"), ("head_dim", "linear_head_dim")):
        if said.get(inside, values.get(outside)) is None:
            raise KeyError(f"linear_attn_config.{inside}" if said else outside)
        found.append(said.get(inside, values.get(outside)))
    return *found, said.get("short_conv_kernel_size") or values.get("linear_conv_kernel_dim", 4), said


def kimi_linear(values: Mapping[str, Any], layer: int) -> Layer:
    heads, width, taps, said = _linear_config(values)
    if (kinds := values.get("layer_types")) is None:
        if said.get("kda_layers") is None:
            raise KeyError("layer_types or linear_attn_config.kda_layers")
        # The released config numbers its layers from 1.
        count = values["num_hidden_layers"]
        kinds = [LINEAR_LAYER if n + 1 in said["kda_layers"] else FULL_LAYER for n in range(count)]
    _only_linear("kimi_linear", kinds[layer], layer)
    return Layer(_kda(values, heads, width, taps), KDA, shapes={"self_attn.A_log": (1, 1, heads, 1)})


def glm5_next(values: Mapping[str, Any], layer: int) -> Layer:
    heads, width, taps, said = _linear_config(values)
    count = values["num_hidden_layers"]
    kinds = values.get("layer_types") or [LINEAR_LAYER if n % 4 != 3 else FULL_LAYER for n in range(count)]
    _only_linear("glm5_next", kinds[layer], layer)
    bound = said.get("gate_lower_bound", values.get("linear_lower_bound", -5.0))
    if bound is None and said.get("safe_gate", bool(said)):
        bound = -5.0
    return Layer(_kda(values, heads, width, taps, decay_lower_bound=float(bound or 0.0)), KDA)


def bailing_hybrid(values: Mapping[str, Any], layer: int) -> Layer:
    count, group = values["num_hidden_layers"], values.get("layer_group_size", 6)
    kinds = values.get("layer_types") or [FULL_LAYER if (n + 1) % group == 0 else LINEAR_LAYER for n in range(count)]
    _only_linear("bailing_hybrid", kinds[layer], layer)
    bound = values.get("kda_lower_bound", -5.0) if values.get("kda_safe_gate", True) else 0.0
    taps, rank = values.get("short_conv_kernel_size", 4), values["hidden_size"]
    mixer = _kda(
        values,
        values["num_attention_heads"],
        values.get("linear_head_dim", values.get("head_dim", 128)),
        taps,
        1e-6,
        decay_lower_bound=float(bound),
        gate_rank=rank,
    )
    return Layer(mixer, KDA, lambda tensors: _of_full_rank(tensors, rank), _of_one_product)


def _renamed(tensors: Tensors, before: str, after: str) -> Tensors:
    return {after + name.removeprefix(before) if name.startswith(before) else name: x for name, x in tensors.items()}


def _of_full_rank(tensors: Tensors, rank: int) -> Tensors:
    """bailing_hybrid's tensors by kimi_linear's names. Its gates are one product of full rank, here the second of two:
    the first is the identity."""
    tensors = _renamed(_renamed(tensors, "attention.", "self_attn."), "self_attn.dense.", "self_attn.o_proj.")
    for gate in "fg":
        tensors[f"self_attn.{gate}_b_proj.weight"] = tensors.pop(f"self_attn.{gate}_proj.weight")
        tensors[f"self_attn.{gate}_a_proj.weight"] = np.eye(rank, dtype=np.float32)
    return tensors


def _of_one_product(tensors: Tensors) -> Tensors:
    """The inverse of `_of_full_rank`. A first product that was trained is multiplied into the second."""
    tensors = dict(tensors)
    for gate in "fg":
        first, second = (tensors.pop(f"self_attn.{gate}_{part}_proj.weight") for part in "ab")
        whole = np.array_equal(first, np.eye(len(first)))
        tensors[f"self_attn.{gate}_proj.weight"] = second if whole else second @ first
    return _renamed(_renamed(tensors, "self_attn.o_proj.", "self_attn.dense."), "self_attn.", "attention.")


def _only_linear(model: str, kind: str, layer: int) -> None:
    if kind != LINEAR_LAYER:
        raise ValueError(f"layer {layer} of {model} is {kind}: only {LINEAR_LAYER!r} has an equivalent here")


LAYERS: dict[str, Callable[[Mapping[str, Any], int], Layer]] = {
    "qwen3_next": qwen3_next,
    "kimi_linear": kimi_linear,
    "glm5_next": glm5_next,
    "glm5_next_text": glm5_next,
    "bailing_hybrid": bailing_hybrid,
}
