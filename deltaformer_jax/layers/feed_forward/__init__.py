"""Feed-forward layers, by the names of `model.feed_forward`. Each is (x [B,T,d_model]) -> [B,T,d_model]."""

from deltaformer_jax.layers.feed_forward.experts import Experts, ExpertsFeedForward
from deltaformer_jax.layers.feed_forward.gated import GeGLU, SwiGLU
from deltaformer_jax.layers.feed_forward.memory import MemoryFeedForward
from deltaformer_jax.layers.feed_forward.plain import GeluFeedForward, ReluFeedForward, SquaredReluFeedForward

FEED_FORWARDS = {
    "swiglu": SwiGLU,
    "geglu": GeGLU,
    "relu": ReluFeedForward,
    "relu2": SquaredReluFeedForward,
    "gelu": GeluFeedForward,
    "memory": MemoryFeedForward,
    "moe": ExpertsFeedForward,
}

__all__ = [
    "FEED_FORWARDS",
    "Experts",
    "ExpertsFeedForward",
    "GeGLU",
    "GeluFeedForward",
    "MemoryFeedForward",
    "ReluFeedForward",
    "SquaredReluFeedForward",
    "SwiGLU",
]
