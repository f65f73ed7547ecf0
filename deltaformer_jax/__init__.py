"""DeltaFormer and the delta-rule family of attention in JAX.

The names exported here are the public interface and stay stable; everything else may change between versions. A name's
module is imported when the name is first used: `import deltaformer_jax` alone imports neither jax nor flax.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaformer_jax.config import Config, Mixer, ModelConfig
    from deltaformer_jax.decoding.generate import generate, generate_batch
    from deltaformer_jax.layers.caches import AttentionCache, StateCache
    from deltaformer_jax.layers.mixers import (
        RWKV7,
        DeltaFormer,
        DeltaNet,
        DeltaProduct,
        GatedDeltaNet,
        GatedDeltaNet2,
        GatedDeltaProduct,
        GatedLinearAttention,
        KimiDeltaAttention,
        LinearAttention,
        Retention,
        SoftmaxAttention,
    )
    from deltaformer_jax.model import LanguageModel
    from deltaformer_jax.ops import (
        Exp,
        KUCache,
        KVCache,
        Linear,
        Relu,
        Round,
        SelfAdjust,
        Softmax,
        causal_attention,
        compress_cache,
        delta_attention,
        delta_values,
        gated_delta_rule,
        gated_linear_attention,
        generalized_delta_rule,
        shift_mix,
    )

__version__ = "0.1.0"

# Module -> the names that this package exports from it.
_EXPORTS = {
    "config": ("Config", "Mixer", "ModelConfig"),
    "decoding.generate": ("generate", "generate_batch"),
    "layers.caches": ("AttentionCache", "StateCache"),
    "layers.mixers": (
        "DeltaFormer",
        "DeltaNet",
        "DeltaProduct",
        "GatedDeltaNet",
        "GatedDeltaNet2",
        "GatedDeltaProduct",
        "GatedLinearAttention",
        "KimiDeltaAttention",
        "LinearAttention",
        "RWKV7",
        "Retention",
        "SoftmaxAttention",
    ),
    "model": ("LanguageModel",),
    "ops": (
        "Exp",
        "KUCache",
        "KVCache",
        "Linear",
        "Relu",
        "Round",
        "SelfAdjust",
        "Softmax",
        "causal_attention",
        "compress_cache",
        "delta_attention",
        "delta_values",
        "gated_delta_rule",
        "gated_linear_attention",
        "generalized_delta_rule",
        "shift_mix",
    ),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
