"""The language model: an embedding, a scanned stack of blocks, a final norm, and the logits.

    x = √d E[tokens];   for each layer:  x = x + mixer(norm(x));  x = x + mlp(norm(x));   logits = norm(x) Eᵀ

Layers follow a repeating pattern of p mixers (`ModelConfig.mixers`). One repetition of the pattern is a period; there
are num_layers / p of them. Each parameter is stacked over the periods (by `jax.vmap` over the initialisation), and
`jax.lax.scan` runs over the periods. The compiled program's size and the compilation time therefore don't grow with
depth.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.config.checks import check_model
from deltaformer_jax.layers.caches import is_selected
from deltaformer_jax.layers.embedding import Embedding
from deltaformer_jax.layers.feed_forward import ExpertsFeedForward
from deltaformer_jax.layers.feed_forward.shift_editor import ShiftedCache
from deltaformer_jax.layers.mixers.build import block_setting, build_mixer, check_mixers
from deltaformer_jax.layers.mixers.feed_forward import (
    build_feed_forward,
    build_pool,
    build_shift_editor,
    check_feed_forwards,
)
from deltaformer_jax.layers.mixers.protocol import check_cache, check_result
from deltaformer_jax.layers.mixers.visible import separators_of
from deltaformer_jax.layers.norms import RMSNorm
from deltaformer_jax.layers.padding import token_positions
from deltaformer_jax.ops.cache.memory_order import in_order
from deltaformer_jax.ops.common.rematerialisation import KEPT, kept
from deltaformer_jax.sharding.activations import constrain
from deltaformer_jax.sharding.shards import gathered, is_cut, keep_all_but_gathered
from pallas_kernels.transform import MADE

_MADE = jax.checkpoint_policies.save_only_these_names(MADE)
_OPERANDS = jax.checkpoint_policies.save_only_these_names(MADE, KEPT)
# Products of activations with kernels have no batch dimensions, unlike those of activations with each other.
_PRODUCTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
# What `ModelConfig.remat` keeps of a block for the backward pass; None: nothing.
_KEPT = {
    "operands": jax.checkpoint_policies.save_from_both_policies(_PRODUCTS, _OPERANDS),
    "products": jax.checkpoint_policies.save_from_both_policies(_PRODUCTS, _MADE),
    "kernels": _MADE,
    "block": None,
    "auto": None,
    "none": keep_all_but_gathered,  # where parameters are cut over devices; elsewhere nothing is recomputed
}


class Block(nnx.Module):
    """x = x + mixer(norm(x)); x = x + mlp(norm(x)): pre-norm residual, x [B,T,d_model] in the compute dtype.

    With `norm_placement="post"`: x = x + norm(mixer(x)); x = x + norm(mlp(x)). With `ffn_shift_rank`, mlp's input is
    edited first (`ShiftEditor`), and the cache is a `ShiftedCache` around the mixer's.
    """

    def __init__(self, config: ModelConfig, mixer: str | Mixer, *, rngs: nnx.Rngs):
        # The model adds 2 num_layers residual branches; with this scale their sum starts with unit variance.
        output_scale = (2 * config.num_layers) ** -0.5
        self.mixer_norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon, gain=config.norm_gain)
        self.mixer = build_mixer(config, mixer, output_scale=output_scale, rngs=rngs)
        self.mlp_norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon, gain=config.norm_gain)
        self.mlp = build_feed_forward(config, mixer, output_scale=output_scale, rngs=rngs)
        self.norms_after = block_setting(config, mixer, "norm_placement") == "post"
        self.editor = build_shift_editor(config, mixer, rngs=rngs)

    def __call__(self, x, *, segment_ids=None, positions=None, cache=None, pool=None, keep=None):
        """(x, cache, the Routing of a mixture of experts or None). `pool`: experts that all layers share. `keep`: for a
        mixer with separators, where they are."""
        own = {} if keep is None else {"keep": keep}
        given = x if self.norms_after else self.mixer_norm(x)
        cache, previous = (cache.mixer, cache.previous) if isinstance(cache, ShiftedCache) else (cache, None)
        result = self.mixer(given, segment_ids=segment_ids, positions=positions, cache=cache, **own)
        check_result(result, x, cache, self.mixer)
        mixed, cache = result
        x = kept(x + (self.mixer_norm(mixed) if self.norms_after else mixed))
        fed = x if self.norms_after else self.mlp_norm(x)
        if self.editor is not None:
            fed, previous = self.editor(fed, segment_ids=segment_ids, previous=previous)
            cache = None if cache is None else ShiftedCache(cache, previous)
        fed, routing = self._feed(fed, segment_ids, pool)
        return x + (self.mlp_norm(fed) if self.norms_after else fed), cache, routing

    def _feed(self, x, segment_ids, pool):
        if isinstance(self.mlp, ExpertsFeedForward):
            return self.mlp.routed(x, segment_ids, pool)
        return self.mlp(x), None

    def init_cache(self, batch: int, capacity: int):
        """The mixer's empty cache, in a `ShiftedCache` if the feed-forward layer has an editor."""
        cache = self.mixer.init_cache(batch, capacity)
        check_cache(cache, batch, self.mixer)
        if self.editor is None:
            return cache
        return ShiftedCache(cache, jnp.zeros((batch, 2 * self.editor.rank), self.editor.dtype))

    def flops_per_token(self, length: int) -> float:
        """The sum of the mixer's and the feed-forward layer's FLOPs per token. The norms are not counted."""
        editor = 0.0 if self.editor is None else self.editor.flops_per_token()
        return self.mixer.flops_per_token(length) + self.mlp.flops_per_token(length) + editor


class LanguageModel(nnx.Module):
    """tokens int [B,T] -> (logits float32 [B,T,vocab_size], cache or None).

        model = LanguageModel(ModelConfig(vocab_size=256), rngs=nnx.Rngs(0))
        logits, _ = model(tokens, segment_ids=segment_ids)

    * `segment_ids` int [B,T]: 0 marks padding; its token ids are ignored. Equal non-zero ids mark one document, and a
      token sees only its own document. None: each row is one document.
    * `positions` int [B,T], for the rotary embedding. By default a token's position is its index among the real tokens
      of its document, counted on from the tokens already in the cache.
    * `cache`: from `init_cache`; each row holds one document. The call appends the new tokens to the cache. They may be
      a whole prompt (padded on the left or right, with `segment_ids`), a piece of a prompt, or one token.

    The model is an nnx module and a plain pytree: `jax.jit`, `jax.grad` and `jax.tree.map` accept it directly. `blocks`
    holds one Block per entry of the pattern; each of their parameters has a leading axis over the periods. Each
    parameter carries `axes`, the names of its dimensions without that leading one: "vocab", "embed", "heads",
    "kv_heads", "head_dim", "mlp", "rank", "conv".
    Parameters are float32. Activations and matrix products use `compute_dtype`. Norms, softmax and the sigmoids of
    gates are computed in float32, and the logits are float32.

    Initial values: kernels are drawn from a truncated normal of variance 1 / fan-in. Kernels that end a residual branch
    are multiplied by 1 / √(2 num_layers). The embedding has standard deviation 0.02. Norms' gains start at 1 and gates'
    biases at 0.

    Raises ValueError naming the field `model.FIELD` if a field's value is not allowed or two fields don't fit.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        check_model(config)
        check_mixers(config)
        check_feed_forwards(config)
        periods = config.num_layers // len(config.mixers)

        def period(key):
            rngs = nnx.Rngs(key)
            return tuple(Block(config, mixer, rngs=rngs) for mixer in config.mixers)

        self.blocks = nnx.List(jax.vmap(period)(jax.random.split(rngs.params(), periods)))
        self.pool = build_pool(config, output_scale=(2 * config.num_layers) ** -0.5, rngs=rngs)
        self.final_norm = RMSNorm(config.d_model, epsilon=config.norm_epsilon, gain=config.norm_gain)
        self.embedding = Embedding(
            config.vocab_size,
            config.d_model,
            tied=config.tie_embeddings,
            scale=1.0 if config.embedding_scale == "one" else None,
            normalised=config.normalise_head,
            dtype=config.compute_dtype,
            rngs=rngs,
        )
        self.periods, self.remat, self.unroll_layers = periods, config.remat, config.unroll_layers
        # Weights of the losses of experts' routers, which training adds to the nats.
        self.balance_loss, self.router_z_loss = config.balance_loss, config.router_z_loss

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(isinstance(block.mlp, ExpertsFeedForward) for block in self.blocks)

    def __call__(self, tokens, *, segment_ids=None, positions=None, cache=None):
        x, cache = self.hidden(tokens, segment_ids=segment_ids, positions=positions, cache=cache)
        return self.logits(x), cache

    def hidden(self, tokens, *, segment_ids=None, positions=None, cache=None, active=None, skipped=None):
        """tokens [B,T] -> (the final norm's output [B,T,d_model] in the compute dtype, cache or None).

        `active`: bool [num_layers]. x_{l+1} = x_l where it is False, as if layer l had been removed
        (`surgery.remove_layers`); its cache stays as it is. One compiled program serves all choices, at the cost of all
        layers.

        `skipped`: bool [num_layers], beside a cache. x_{l+1} = x_l where it is True, and layer l's cache takes the
        tokens as if it had run on x_l. Only what the cache needs is computed: keys and values, DeltaFormer's write, the
        state of a linear memory; no read, no output, no feed-forward layer. One compiled program serves all choices.
        Source: Men et al., "ShortGPT", arXiv 2403.03853: layers skipped for a prompt, and run for what is generated.
        """
        self._check(tokens, segment_ids, positions, active=active, skipped=skipped)
        if skipped is not None and cache is None:
            raise ValueError("skipped: a layer is skipped for the sake of later tokens; give their cache too")
        return _hidden(self, tokens, segment_ids, positions, cache, active, skipped=skipped)[:2]

    def routed(self, tokens, *, segment_ids=None, active=None):
        """(the final norm's output [B,T,d_model], Routing of the layers of experts).

        The arrays of the Routing have a leading axis over those layers, in their order. With `active`, the sums of a
        layer that is left out are 0. Raises ValueError for a model without experts.
        """
        self._check(tokens, segment_ids, None, active=active)
        if not self.has_experts:
            raise ValueError("routed: no layer is a mixture of experts (model.feed_forward = 'moe')")
        x, _, _, routing = _hidden(self, tokens, segment_ids, None, None, active)
        return x, routing

    def look(self, tokens, see, *, segment_ids=None, positions=None, active=None):
        """(the final norm's output [B,T,d_model], what `see` returned for each layer).

        see(x_l, x_{l+1}, real) -> a pytree of arrays: x_l and x_{l+1} [B,T,d_model], the residual stream before and
        after layer l; real bool [B,T], False at padding. Each leaf gets a leading axis over the layers. `active`: see
        `hidden`. Each function `see` is compiled for anew.
        """
        self._check(tokens, segment_ids, positions, active=active)
        x, _, seen, _ = _hidden(self, tokens, segment_ids, positions, None, active, see)
        return x, seen

    def read(self, tokens, see, *, cache, segment_ids=None, skipped=None):
        """(the final norm's output, cache, what `see` returned for each layer): `hidden` and `look` of tokens that
        follow those in the cache, for example of a prompt."""
        self._check(tokens, segment_ids, None, skipped=skipped)
        return _hidden(self, tokens, segment_ids, None, cache, None, see, skipped)[:3]

    def _check(self, tokens, segment_ids, positions, **switches):
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [batch, length]; they are {tokens.dtype}{list(tokens.shape)}")
        for name, ids in (("segment_ids", segment_ids), ("positions", positions)):
            if ids is None:
                continue
            if ids.shape != tokens.shape:
                raise ValueError(f"{name} must have tokens' shape {tokens.shape}; it has {ids.shape}")
            if not jnp.issubdtype(ids.dtype, jnp.integer):
                raise TypeError(f"{name} must be integers; it has dtype {ids.dtype}")
        layers = self.periods * len(self.blocks)
        for name, given in switches.items():
            if given is not None and (given.shape != (layers,) or given.dtype != bool):
                raise ValueError(
                    f"{name} must be booleans [{layers}], one for each layer; it is {given.dtype}{list(given.shape)}"
                )

    def logits(self, x):
        """x [B,T,d_model] from `hidden` -> float32 [B,T,vocab_size]."""
        return self.embedding.logits(x)

    def init_cache(self, batch: int, capacity: int):
        """Empty caches for `capacity` tokens in each of `batch` rows: a tuple with one cache per entry of the pattern.

        Every array in them has a leading axis over the periods.
        """

        def stack(x):
            return jnp.broadcast_to(x, (self.periods, *x.shape))

        caches = [block.init_cache(batch, capacity) for block in self.blocks]
        return tuple(jax.tree.map(stack, cache) for cache in caches)

    def flops_per_token(self, length: int) -> float:
        """Forward FLOPs per token, the mean over a document of `length` tokens; a multiply-add counts 2.

        This is the sum of the modules' closed forms: the products with kernels, causal attention as half of the T × T
        square, and the logits. A training step costs three times this: the backward pass counts as two forward passes,
        and recomputation is not counted.
        """
        blocks = sum(block.flops_per_token(length) for block in self.blocks)
        return self.periods * blocks + self.embedding.flops_per_token(length)


# Jitted here so that a model called outside jit is compiled once for each configuration and shape, not run op by op.
@functools.partial(jax.jit, static_argnames="see")
def _hidden(model: LanguageModel, tokens, segment_ids, positions, cache, active, see=None, skipped=None):
    """(the final norm's output, cache or None, what `see` returned or None, the Routing of layers of experts)."""
    # Caches of chosen tokens may be numbered by places: such a layer then counts on from its own cache's length.
    count_by_themselves = positions is None and active is None
    if positions is None:
        # All layers have seen the same tokens, but for those that were not active.
        start = None if cache is None else min(cache, key=is_selected).length[0]
        if start is not None and active is not None:
            start = functools.reduce(jnp.maximum, (jnp.max(layer.length, axis=0) for layer in cache))
        positions = token_positions(segment_ids, *tokens.shape, start)
    # Otherwise the compiler splits them as the residual stream is, and gathers what follows from them: rotations.
    positions = constrain(positions, "batch", "tokens")
    segment_ids = None if segment_ids is None else constrain(segment_ids, "batch", "tokens")

    keeps = separators_of([block.mixer for block in model.blocks], tokens)
    keeps = [None if keep is None else constrain(keep, "batch", "tokens") for keep in keeps]

    def apply(block, x, cache, keep):
        block = gathered(block, model.embedding.dtype)
        of_text = None if count_by_themselves and is_selected(cache) else positions
        return block(x, segment_ids=segment_ids, positions=of_text, cache=cache, pool=model.pool, keep=keep)

    unrolled = model.unroll_layers and cache is None
    if model.remat != "none" or is_cut(model.blocks):
        # Inside scan the recomputation is not merged with the forward pass, so the barrier against CSE is not needed.
        apply = jax.checkpoint(apply, prevent_cse=unrolled, policy=_KEPT[model.remat])

    real = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids != 0

    def period(x, layers):
        blocks, caches, switches, skips = layers
        after, seen, routed = [], [], []
        for i, (block, cache, keep) in enumerate(zip(blocks, caches, keeps)):
            if skips is None:
                y, cache, routing = apply(block, x, in_order(cache), keep)
            else:
                run = lambda x, cache, block=block, keep=keep: apply(block, x, cache, keep)[:2]
                # What only the block's output needs is left out by the compiler.
                skip = lambda x, cache, run=run: (x, run(x, cache)[1])
                routing = None
                y, cache = jax.lax.cond(skips[i], skip, run, x, in_order(cache))
            y = constrain(y, "batch", "stream", "embed")
            before, x = x, y if switches is None else jnp.where(switches[i], y, x)
            after.append(cache)
            seen.append(None if see is None else see(before, x, real))
            if routing is not None:
                on = 1.0 if switches is None else switches[i].astype(jnp.float32)
                routed.append(jax.tree.map(lambda x, on=on: on * x, routing))
        return x, (tuple(after), tuple(seen), tuple(routed))

    # The scan only reads the attention mixers' caches, and hands back the entries of the new tokens. They are written
    # after it, in place where the caller has donated the caches: a scan that returned its caches would copy each.
    x = constrain(model.embedding(tokens, segment_ids), "batch", "stream", "embed")
    blocks = tuple(model.blocks)
    by_period = lambda given: None if given is None else given.reshape(model.periods, len(blocks))
    switches, skips = by_period(active), by_period(skipped)
    if unrolled:
        found = []
        for i in range(model.periods):
            with jax.named_scope("layer"):
                own, on = jax.tree.map(lambda stack, i=i: stack[i], (blocks, switches))
                x, (_, *found_here) = period(x, (own, (None,) * len(blocks), on, None))
                found.append(tuple(found_here))
        seen, routed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
        return constrain(model.final_norm(x), "batch", "tokens", "embed"), None, _by_layer(seen), _by_layer(routed)
    caches = (None,) * len(blocks) if cache is None else ops.read_only(cache)
    x, (after, seen, routed) = jax.lax.scan(period, x, (blocks, caches, switches, skips))
    x = constrain(model.final_norm(x), "batch", "tokens", "embed")
    if cache is None:
        return x, None, _by_layer(seen), _by_layer(routed)
    after = ops.written(cache, after, axes=1)
    if switches is not None:
        after = tuple(_where(switches[:, i], *pair) for i, pair in enumerate(zip(after, cache)))
    return x, after, _by_layer(seen), None


def _by_layer(seen):
    """Pytrees of arrays [periods, ...], one for each entry of the pattern -> one of arrays [num_layers, ...]."""
    if not seen or seen[0] is None:
        return None
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:]), *seen)


def _where(condition, chosen, other):
    """`chosen` where condition [periods], else `other`: two pytrees of arrays [periods, ...]."""
    pick = lambda a, b: jnp.where(condition.reshape(-1, *[1] * (a.ndim - 1)), a, b)
    return jax.tree.map(pick, chosen, other)


def parameters_of_a_token(model: LanguageModel) -> int:
    """The number of parameters that a token goes through: all but those of the experts that are not its own.

    Of experts that L layers share a token goes through k in each, counted as L k different ones, at most all.
    """
    layers = [part for _, part in nnx.iter_modules(model) if isinstance(part, ExpertsFeedForward)]
    idle = 0.0
    for layer in layers:
        if layer.experts is not None:
            idle += num_parameters(layer.experts) * (1 - layer.experts_per_token / layer.num_experts)
    if layers and model.pool is not None:
        chosen = sum(model.periods * layer.experts_per_token for layer in layers)
        idle += num_parameters(model.pool) * max(0.0, 1 - chosen / layers[0].num_experts)
    return num_parameters(model) - round(idle)


def num_parameters(model) -> int:
    """The number of parameters in `model`, or in any pytree of arrays or ShapeDtypeStructs.

    The rows that pad the vocabulary are counted too.
    """
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
