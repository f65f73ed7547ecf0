"""The scalars of KV shifting that a model has learnt, k'_t = a₁ k_t + a₂ k_{t−1} and v'_t = b₁ v_t + b₂ v_{t−1}.

Source: Xu et al., "KV Shifting Attention Enhances Language Modeling", arXiv 2411.19574, Table 4.
"""

from __future__ import annotations

from typing import Any

from deltaformer_jax.model import LanguageModel

NUMBERS = ("current_key", "previous_key", "older_key", "current_value", "previous_value", "older_value")


def kv_shift_heads(model: LanguageModel) -> list[dict[str, Any]]:
    """{"layer", "head", and the scalars that it has} for each key and value head with KV shifting, layer by layer."""
    found = []
    for place, block in enumerate(model.blocks):
        shift = getattr(getattr(block.mixer, "inputs", None), "shift", None)
        if shift is None:
            continue
        there = {name: getattr(shift, name)[...] for name in NUMBERS if getattr(shift, name) is not None}
        first = next(iter(there.values()))
        periods, heads = first.shape[0], first.shape[-1]
        for period in range(periods):
            layer = period * len(model.blocks) + place
            for head in range(heads):
                numbers = {name: values[period, ..., head].tolist() for name, values in there.items()}
                found.append({"layer": layer, "head": head, **numbers})
    return sorted(found, key=lambda head: (head["layer"], head["head"]))


def signs(heads: list[dict[str, Any]]) -> dict[str, int]:
    """How many heads have a₁ > a₂ or not, and b₁ > b₂ or not; equal numbers count as "not"."""
    counts = {f"key {key} value {value}": 0 for key in "+-" for value in "+-"}
    for head in heads:
        key, value = (
            "+" if head.get(f"current_{part}", 1.0) > head.get(f"previous_{part}", 0.0) else "-"
            for part in ("key", "value")
        )
        counts[f"key {key} value {value}"] += 1
    return counts
