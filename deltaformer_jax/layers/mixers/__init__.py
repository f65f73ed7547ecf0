"""The mixers, one per file. `protocol` defines what a mixer is; `build` makes one from an entry of `model.mixers`."""

from deltaformer_jax.layers.mixers.delta_former import DeltaFormer
from deltaformer_jax.layers.mixers.delta_net import DeltaNet
from deltaformer_jax.layers.mixers.delta_rules.delta_product import DeltaProduct, GatedDeltaProduct
from deltaformer_jax.layers.mixers.delta_rules.gated_delta_net_2 import GatedDeltaNet2
from deltaformer_jax.layers.mixers.delta_rules.rwkv7 import RWKV7
from deltaformer_jax.layers.mixers.gated_delta_net import GatedDeltaNet
from deltaformer_jax.layers.mixers.gated_linear_attention import GatedLinearAttention
from deltaformer_jax.layers.mixers.kimi_delta_attention import KimiDeltaAttention
from deltaformer_jax.layers.mixers.linear_attention import LinearAttention
from deltaformer_jax.layers.mixers.retention import Retention
from deltaformer_jax.layers.mixers.softmax_attention import SoftmaxAttention

# Name in `model.mixers` -> class.
MIXERS = {
    "delta_former": DeltaFormer,
    "softmax_attention": SoftmaxAttention,
    "linear_attention": LinearAttention,
    "retention": Retention,
    "gated_linear_attention": GatedLinearAttention,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kimi_delta_attention": KimiDeltaAttention,
    "gated_delta_net_2": GatedDeltaNet2,
    "delta_product": DeltaProduct,
    "gated_delta_product": GatedDeltaProduct,
    "rwkv7": RWKV7,
}

__all__ = [
    "MIXERS",
    "RWKV7",
    "DeltaFormer",
    "DeltaNet",
    "DeltaProduct",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedDeltaProduct",
    "GatedLinearAttention",
    "KimiDeltaAttention",
    "LinearAttention",
    "Retention",
    "SoftmaxAttention",
]
