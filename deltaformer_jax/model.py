"""The language model: an embedding, a stack of blocks that is scanned, a norm, logits.

    x = √d E[tokens];   for each layer:  x = x + mixer(norm(x));  x = x + swiglu(norm(x));   logits = norm(x) Eᵀ

Layers follow a repeating pattern of p mixers (`ModelConfig.mixers`). The parameters of layers p apart are stacked
(`jax.vmap` over their initialisation), and `jax.lax.scan` goes over the num_layers / p periods, so that the program's
size and compilation time don't grow with depth.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.layers.embedding import Embedding
from deltaformer_jax.layers.feed_forward import SwiGLU
from deltaformer_jax.layers.mixers.delta_former import DeltaFormer
from deltaformer_jax.layers.mixers.delta_net import DeltaNet
from deltaformer_jax.layers.mixers.gated_delta_net import GatedDeltaNet
from deltaformer_jax.layers.mixers.gated_linear_attention import GatedLinearAttention
from deltaformer_jax.layers.mixers.kimi_delta_attention import KimiDeltaAttention
from deltaformer_jax.layers.mixers.linear_attention import LinearAttention
from deltaformer_jax.layers.mixers.retention import Retention
from deltaformer_jax.layers.mixers.softmax_attention import SoftmaxAttention
from deltaformer_jax.layers.norms import RMSNorm
from deltaformer_jax.ops.common.dispatch import IMPLEMENTATIONS

# What a name in `model.mixers` stands for.
MIXERS = {
    "delta_former": DeltaFormer,
    "softmax_attention": SoftmaxAttention,
    "linear_attention": LinearAttention,
    "retention": Retention,
    "gated_linear_attention": GatedLinearAttention,
    "delta_net": DeltaNet,
    "gated_delta_net": GatedDeltaNet,
    "kimi_delta_attention": KimiDeltaAttention,
}

# Fields of ModelConfig whose 0 or "" is a mixer's None.
_ZERO_IS_NONE = (
    "rope_base",
    "window",
    "chunk_size",
    "implementation",
    "write_scale",
    "read_scale",
    "num_value_heads",
    "value_dim",
)
# Fields whose value means: what the mixer does by itself.
_MIXERS_OWN = {"conv_size": -1, "output_gate": "auto"}
# Fields that ask for something: without a mixer that has it they would be forgotten.
_ASKS = (
    "window",
    "forget_gate",
    "sinks",
    "qk_norm",
    "kv_shift",
    "write_query",
    "write_similarity",
    "read_similarity",
    "write_scale",
    "read_scale",
    "write_key_norm",
    "alpha",
    "beta",
    "num_value_heads",
    "negative_eigenvalues",
)


class Block(nnx.Module):
    """x = x + mixer(norm(x)); x = x + swiglu(norm(x)): pre-norm residual, x [B,T,d_model] in the compute dtype."""

    def __init__(self, config: ModelConfig, mixer: str | Mixer, *, rngs: nnx.Rngs):
        output_scale = (2 * config.num_layers) ** -0.5  # so that 2 num_layers branches add up to unit variance
        self.mixer_norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon)
        self.mixer = build_mixer(config, mixer, output_scale=output_scale, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon)
        self.mlp = SwiGLU(
            config.d_model, mlp_dim(config), output_scale=output_scale, dtype=config.compute_dtype, rngs=rngs
        )

    def __call__(self, x, *, segment_ids=None, positions=None, cache=None):
        mixed, cache = self.mixer(self.mixer_norm(x), segment_ids=segment_ids, positions=positions, cache=cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache

    def flops_per_token(self, length: int) -> float:
        """The mixer's and the feed-forward's; norms count nothing."""
        return self.mixer.flops_per_token(length) + self.mlp.flops_per_token(length)


class LanguageModel(nnx.Module):
    """tokens int [B,T] -> (logits float32 [B,T,vocab_size], cache or None).

        model = LanguageModel(ModelConfig(vocab_size=256), rngs=nnx.Rngs(0))
        logits, _ = model(tokens, segment_ids=segment_ids)

    * `segment_ids` int [B,T]: 0 is padding, whose tokens don't matter; equal non-zero ids are one document, which is
      all that a token sees. None: one document per row.
    * `positions` int [B,T]: by default the index among the document's real tokens, after those in the cache.
    * `cache`: from `init_cache`, one document per row; the call takes the new tokens in, be they a prompt (padded left
      or right, with `segment_ids`), a part of one, or one token.

    An nnx module and a plain pytree: `jax.jit`, `jax.grad` and `jax.tree.map` take it as it is. `blocks` holds one
    Block per entry of the pattern, every parameter with a leading axis over the periods. Each parameter carries `axes`,
    the names of its dimensions without that leading one: "vocab", "embed", "heads", "kv_heads", "head_dim", "mlp",
    "rank", "conv".
    Parameters are float32; `compute_dtype` holds between them; norms, gates, softmax and logits are float32.

    Kernels start as a truncated normal of variance 1 / fan-in; those that end a residual branch are multiplied by
    1 / √(2 num_layers); the embedding has standard deviation 0.02; norms' gains start at 1, gates' biases at 0.

    Raises ValueError naming the field `model.FIELD` for a configuration that doesn't hold together.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        check_config(config)
        periods = config.num_layers // len(config.mixers)

        def period(key):
            rngs = nnx.Rngs(key)
            return tuple(Block(config, mixer, rngs=rngs) for mixer in config.mixers)

        self.blocks = nnx.List(jax.vmap(period)(jax.random.split(rngs.params(), periods)))
        self.final_norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon)
        self.embedding = Embedding(
            config.vocab_size, config.d_model, tied=config.tie_embeddings, dtype=config.compute_dtype, rngs=rngs
        )
        self.periods, self.remat = periods, config.remat

    def __call__(self, tokens, *, segment_ids=None, positions=None, cache=None):
        x, cache = self.hidden(tokens, segment_ids=segment_ids, positions=positions, cache=cache)
        return self.logits(x), cache

    def hidden(self, tokens, *, segment_ids=None, positions=None, cache=None):
        """tokens [B,T] -> (the final norm's output [B,T,d_model] in the compute dtype, cache or None)."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [batch, length]; they are {tokens.dtype}{list(tokens.shape)}")
        if segment_ids is not None and segment_ids.shape != tokens.shape:
            raise ValueError(f"segment_ids must have tokens' shape {tokens.shape}; it has {segment_ids.shape}")
        if positions is None:
            start = None if cache is None else cache[0].length[0]  # all layers have seen the same tokens
            positions = ops.token_positions(segment_ids, *tokens.shape, start)

        def apply(block, x, cache):
            return block(x, segment_ids=segment_ids, positions=positions, cache=cache)

        if self.remat == "block":
            apply = jax.checkpoint(apply, prevent_cse=False)  # a scan's body needs no protection from CSE

        def period(x, layers):
            blocks, caches = layers
            after = []
            for block, cache in zip(blocks, caches):
                x, cache = apply(block, x, cache)
                after.append(cache)
            return x, tuple(after)

        caches = (None,) * len(self.blocks) if cache is None else cache
        x, caches = jax.lax.scan(period, self.embedding(tokens, segment_ids), (tuple(self.blocks), caches))
        return self.final_norm(x), None if cache is None else caches

    def logits(self, x):
        """x [B,T,d_model] from `hidden` -> float32 [B,T,vocab_size]."""
        return self.embedding.logits(x)

    def init_cache(self, batch: int, capacity: int):
        """Empty caches for `capacity` tokens in each of `batch` rows: a tuple with one cache per entry of the pattern,
        every array with a leading axis over the periods."""

        def stack(x):
            return jnp.broadcast_to(x, (self.periods, *x.shape))

        return tuple(jax.tree.map(stack, block.mixer.init_cache(batch, capacity)) for block in self.blocks)

    def flops_per_token(self, length: int) -> float:
        """Forward FLOPs per token, the mean over a document of `length` tokens; a multiply-add counts 2.

        The sum of the modules' closed forms: products with kernels, causal attention as half the square, and the
        logits. Training counts three times this (the backward pass is two forwards'; recomputation is not counted).
        """
        blocks = sum(block.flops_per_token(length) for block in self.blocks)
        return self.periods * blocks + self.embedding.flops_per_token(length)


def num_parameters(model) -> int:
    """How many numbers `model` (or any pytree of arrays or their shapes) holds, the vocabulary's padding included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))


def mlp_dim(config: ModelConfig) -> int:
    """`config.mlp_dim`, or 8/3 d_model rounded up to a multiple of 64."""
    return config.mlp_dim or -(-8 * config.d_model // (3 * 64)) * 64


def build_mixer(config: ModelConfig, mixer: str | Mixer, *, output_scale: float, rngs: nnx.Rngs) -> nnx.Module:
    """The mixer an entry of `model.mixers` names, with the model's settings and the entry's overrides."""
    name, overrides = (mixer, ()) if isinstance(mixer, str) else (mixer.name, mixer.overrides)
    settings = dataclasses.replace(config, **dict(overrides))
    arguments = {field: getattr(settings, field) for field in mixer_fields(name)}
    for field in _ZERO_IS_NONE:
        if field in arguments and not arguments[field]:
            arguments[field] = None
    for field, own in _MIXERS_OWN.items():
        if field in arguments and arguments[field] == own:
            del arguments[field]
    if "output_gate" in arguments:
        arguments["output_gate"] = arguments["output_gate"] == "on"
    try:
        return MIXERS[name](
            config.d_model, **arguments, output_scale=output_scale, dtype=config.compute_dtype, rngs=rngs
        )
    except ValueError as error:  # it begins with the argument's name, which is the field's
        raise ValueError(f"model.{error} (of {mixer!r} in model.mixers)") from None


def mixer_fields(name: str) -> list[str]:
    """The fields of ModelConfig that the mixer of that name uses, which are those that a Mixer may override."""
    parameters = inspect.signature(MIXERS[name].__init__).parameters
    return [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name in parameters and parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    ]


def check_config(config: ModelConfig):
    """Raises ValueError naming `model.FIELD` unless the model's own fields hold together; mixers check theirs."""
    for field in ("vocab_size", "d_model", "num_layers"):
        if getattr(config, field) < 1:
            raise ValueError(f"model.{field}={getattr(config, field)} must be at least 1")
    if config.mlp_dim < 0:
        raise ValueError(f"model.mlp_dim={config.mlp_dim} must be 0 (8/3 d_model) or more")
    if config.norm_epsilon <= 0:
        raise ValueError(f"model.norm_epsilon={config.norm_epsilon} must be positive")
    _check_choice("model.compute_dtype", config.compute_dtype, ("float32", "bfloat16"))
    _check_choice("model.remat", config.remat, ("none", "block"))
    _check_choice("model.output_gate", config.output_gate, ("auto", "on", "off"))
    if not isinstance(config.mixers, (tuple, list)) or not config.mixers:
        raise ValueError(f"model.mixers={config.mixers!r} must be a tuple of mixer names or Mixer(name, ...)")
    for mixer in config.mixers:
        _check_mixer(mixer)
    if config.num_layers % len(config.mixers):
        raise ValueError(
            f"model.num_layers={config.num_layers} must be a multiple of the length of model.mixers,"
            f" {len(config.mixers)}"
        )
    _check_choice("model.implementation", config.implementation, ("", *IMPLEMENTATIONS))
    there = {field for mixer in config.mixers for field in mixer_fields(_name(mixer))}
    for field in _ASKS:
        value = getattr(config, field)
        if field not in there and value != getattr(ModelConfig, field):
            raise ValueError(f"model.{field}={value!r}, but no mixer in model.mixers={config.mixers} has one")


def _name(mixer: str | Mixer) -> str:
    return mixer if isinstance(mixer, str) else mixer.name


def _check_mixer(mixer: str | Mixer):
    if not isinstance(mixer, (str, Mixer)):
        raise ValueError(f"model.mixers holds {mixer!r}; its entries are mixer names or Mixer(name, ...)")
    _check_choice("model.mixers", _name(mixer), tuple(MIXERS))
    if isinstance(mixer, Mixer):
        for field, _ in mixer.overrides:
            _check_choice(f"model.mixers: an override of {mixer.name}", field, mixer_fields(mixer.name))


def _check_choice(what: str, value: str, choices: Iterable[str]):
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what}: {value!r} is not one of {', '.join(map(repr, choices))}{hint}")
