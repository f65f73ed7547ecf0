"""Small models for the model's tests."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.model import LanguageModel
from support.layers_cases import randomise

VOCABULARY = 37

SMALL = dict(
    vocab_size=VOCABULARY,
    d_model=16,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=24,
    mixers=("delta_former", Mixer("softmax_attention", window=3)),
    implementation="parallel",
)

# Every mixer, with those options that add parameters or caches.
MIXERS = {
    "softmax_attention": Mixer("softmax_attention", window=4, forget_gate=True, sinks=True, output_gate="on"),
    "delta_former": Mixer("delta_former", write_query="projected", alpha="sigmoid", conv_size=3, kv_shift=True),
    "linear_attention": "linear_attention",
    "retention": "retention",
    "gated_linear_attention": "gated_linear_attention",
    "delta_net": "delta_net",
    "gated_delta_net": Mixer("gated_delta_net", num_value_heads=4, value_dim=4),
    "kimi_delta_attention": Mixer("kimi_delta_attention", negative_eigenvalues=True),
    "gated_delta_net_2": "gated_delta_net_2",
    "gated_delta_product": "gated_delta_product",
    "rwkv7": "rwkv7",
}


# Every option of the model, and a few of the mixers'.
MODELS = {
    "hybrid": {},
    "one mixer, untied": dict(mixers=("delta_former",), num_layers=2, tie_embeddings=False, kv_shift=True),
    "three overrides": dict(
        num_layers=3,
        kv_shift=True,
        qk_norm=True,
        rope_base=0.0,
        mixers=(
            Mixer("delta_former", write_query="projected", write_similarity="relu", alpha="sigmoid"),
            Mixer("softmax_attention", num_heads=2, num_kv_heads=1, head_dim=8, rope_base=100.0),
            Mixer("delta_former", write_query="query", beta="one"),
        ),
    ),
    "memories": dict(
        num_layers=2,
        implementation="",
        mixers=("gated_delta_net", Mixer("softmax_attention", forget_gate=True, sinks=True)),
    ),
    "gates": dict(
        num_layers=2,
        conv_size=3,
        output_gate="on",
        ffn_shift_rank=3,
        mixers=(Mixer("delta_former", kv_shift=True), "softmax_attention"),
    ),
}


def make_model(**fields):
    return randomise(lambda: LanguageModel(ModelConfig(**SMALL | fields), rngs=nnx.Rngs(0)))


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, shape).astype(np.int32)


def mean_loss(model, tokens, segment_ids=None):
    """Mean cross-entropy of the next token, over positions whose next token is in the same segment."""
    logits, _ = model(tokens, segment_ids=segment_ids)
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    if segment_ids is None:
        return jnp.mean(losses)
    counted = (segment_ids[:, :-1] == segment_ids[:, 1:]) & (segment_ids[:, :-1] != 0)
    return jnp.sum(jnp.where(counted, losses, 0.0)) / jnp.sum(counted)


# Jitted once for all tests, which all use tokens of shape [2, 12].
ROWS, LENGTH = 2, 12
forward = jax.jit(lambda model, tokens: model(tokens)[0])
forward_segments = jax.jit(lambda model, tokens, ids: model(tokens, segment_ids=ids)[0])
loss_and_gradient = jax.jit(jax.value_and_grad(mean_loss))
