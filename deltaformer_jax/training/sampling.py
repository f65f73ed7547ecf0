"""Text from a model: the prompt in one call, then one token at a time through the cache."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.training.state import ModelParts


def choose(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_k: int) -> jax.Array:
    """int32 [B] from float32 [B, V]: argmax at temperature 0, else a draw from softmax(logits / temperature) over the
    top_k largest (0: all; ties with the k-th stay in)."""
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        candidates = jnp.where(logits >= kth, logits, -jnp.inf)
    else:
        candidates = logits
    drawn = jax.random.categorical(key, candidates / jnp.where(temperature > 0, temperature, 1.0))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


@partial(jax.jit, static_argnames=("graphdef", "capacity", "top_k"))
def _prefill(graphdef, params, tokens, segment_ids, key, temperature, *, capacity: int, top_k: int):
    model = nnx.merge(graphdef, nnx.State(params))
    hidden, cache = model.hidden(
        tokens, segment_ids=segment_ids, positions=None, cache=model.init_cache(tokens.shape[0], capacity)
    )
    last = jnp.sum(segment_ids > 0, axis=1) - 1
    logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]
    return choose(logits, key, temperature, top_k), cache


@partial(jax.jit, static_argnames=("graphdef", "top_k"), donate_argnames=("cache",))
def _decode(graphdef, params, token, cache, key, position, temperature, *, top_k: int):
    model = nnx.merge(graphdef, nnx.State(params))
    logits, cache = model(token[:, None], cache=cache)
    return choose(logits[:, 0], jax.random.fold_in(key, position), temperature, top_k), cache


def check_sampling(tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Raise ValueError naming the argument of `generate` that is out of range."""
    if tokens < 1:
        raise ValueError(f"tokens = {tokens}: give 1 or more")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature = {temperature}: give 0 (always the likeliest token) or more")
    if top_k < 0:
        raise ValueError(f"top_k = {top_k}: give 0 (all tokens) or more")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed}: give 0 to 2^32 - 1")


def generate(
    parts: ModelParts,
    params,
    prompt: Sequence[int],
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> Iterator[int]:
    """Yield `tokens` token ids that go on from `prompt` (which is not empty: it starts with the document separator).

    Prompt and cache are padded to a power of two, so that a few compiled programs serve every length. The same seed
    gives the same text. Raises ValueError, at the call, for an empty prompt and as `check_sampling` does.
    """
    if len(prompt) == 0:
        raise ValueError("prompt: no token; start it with the document separator")
    check_sampling(tokens, temperature, top_k, seed)
    return _generate(parts, params, list(prompt), tokens, float(temperature), top_k, seed)


def _generate(parts, params, prompt, tokens, temperature, top_k, seed):
    width = _power_of_two(len(prompt))
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(prompt)] = prompt
    real = (np.arange(width) < len(prompt)).astype(np.int32)[None]
    key, heat = jax.random.key(seed), jnp.float32(temperature)
    capacity = _power_of_two(len(prompt) + tokens)
    token, cache = _prefill(
        parts.graphdef, params, padded, real, jax.random.fold_in(key, 0), heat, capacity=capacity, top_k=top_k
    )
    yield int(token[0])
    for position in range(1, tokens):
        token, cache = _decode(parts.graphdef, params, token, cache, key, position, heat, top_k=top_k)
        yield int(token[0])


def _power_of_two(length: int) -> int:
    return max(16, 1 << (length - 1).bit_length())
