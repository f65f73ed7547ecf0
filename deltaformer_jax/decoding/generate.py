"""All prompts at once: one prefill call, then one decoding step per token. continuous.py refills rows that end."""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.decoding.choose import choose, power_of_two
from deltaformer_jax.decoding.chosen.layers import Slots
from deltaformer_jax.decoding.memory import check_memory
from deltaformer_jax.decoding.requests import check_prompt, check_sampling, items, layer_switches, vocabulary_of
from deltaformer_jax.layers.linear import cast_kernels
from deltaformer_jax.model import LanguageModel


def _row_keys(key: jax.Array, position: jax.Array, rows: int) -> jax.Array:
    """One key per row for the draw at `position`. A row's key does not depend on the number of rows."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, position), jnp.arange(rows))


@partial(jax.jit, static_argnames=("graphdef", "capacity", "top_k"))
def _prefill(graphdef, params, tokens, segment_ids, skipped, key, temperature, top_p, *, capacity: int, top_k: int):
    model = nnx.merge(graphdef, params)
    cache, skip = model.init_cache(tokens.shape[0], capacity), {} if skipped is None else {"skipped": skipped}
    hidden, cache = model.hidden(tokens, segment_ids=segment_ids, cache=cache, **skip)
    last = jnp.sum(segment_ids > 0, axis=1) - 1
    logits = model.logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]
    return choose(logits, _row_keys(key, 0, tokens.shape[0]), temperature, top_k, top_p), cache


@partial(jax.jit, static_argnames=("graphdef", "top_k"), donate_argnames=("cache",))
def decode_step(graphdef, params, token, cache, key, position, temperature, top_p, *, top_k: int):
    """(the next token int32 [B], the cache) after one token of each row. The cache is donated, and written in place."""
    model = nnx.merge(graphdef, params)
    logits, cache = model(token[:, None], cache=cache)
    return choose(logits[:, 0], _row_keys(key, position, token.shape[0]), temperature, top_k, top_p), cache


def with_weights_in(model: LanguageModel, dtype) -> LanguageModel:
    """The model with the kernels of its products and the embedding's table in `dtype`, for decoding, which reads all of
    them for every token. Norms, gates, decays and convolutions stay in float32. In the model's compute dtype no product
    changes; a narrower dtype rounds the weights."""
    model = nnx.merge(*nnx.split(model))  # the caller's stays as it is
    model.embedding = model.embedding.with_ready_head()
    model = cast_kernels(model, dtype)
    graphdef, state = nnx.split(model)
    table = state["embedding"]["table"]
    state["embedding"]["table"] = table.replace(table[...].astype(dtype))
    return nnx.merge(graphdef, state)


def generate(model: LanguageModel, prompt: Sequence[int], tokens: int, **options) -> Iterator[int]:
    """Yield `tokens` token ids that continue one prompt. `options` are those of `generate_batch`.

    ids = list(generate(model, [0, 5, 3], 20, temperature=0.0))
    """
    return (int(row[0]) for row in generate_batch(model, [prompt], tokens, **options))


def generate_batch(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 1.0,
    seed: int = 0,
    skip_in_prefill: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """Yield, `tokens` times, the next token id of every prompt: int32 [len(prompts)].

    Args:
      prompts: lists of token ids, each at least one id long and beginning with the document separator.
      tokens: the number of ids to generate per prompt.
      temperature, top_k, top_p: see `choose`; top_p = 1 means all tokens.
      seed: row b's draw depends on (seed, b, position) only. The same seed gives the same texts, and a row's text does
        not depend on the other prompts.
      skip_in_prefill: numbers of layers, from 0, that only fill their caches while prompts are read; see `skipped` of
        `LanguageModel.hidden`.

    Prompts are padded on the right to a common power of two, and the cache's capacity is a power of two, so that few
    compiled programs serve all lengths. Padding has segment id 0: nothing attends to it and it is not stored in the
    cache. Raises ValueError, at the call, for an empty prompt or an argument out of range, and TypeError for ids that
    are not integers and arguments of another kind.
    """
    vocabulary, prompts = vocabulary_of(model), items("prompts", prompts, "a list of lists of token ids")
    if not prompts:
        raise ValueError("prompt: has no token; begin it with the document separator")
    prompts = [check_prompt(prompt, row, vocabulary) for row, prompt in enumerate(prompts)]
    check_sampling(tokens, temperature, top_k, top_p, seed)
    skipped = layer_switches("skip_in_prefill", skip_in_prefill, model)
    size = {"rows": len(prompts), "slots": Slots.of(None, power_of_two(max(map(len, prompts)) + tokens))}
    check_memory("tokens", tokens, *nnx.split(model), fix="fewer tokens, or fewer or shorter prompts", **size)
    # temperature and top_p are arrays, so that new values don't compile a new program.
    nucleus = None if top_p == 1 else jnp.float32(top_p)
    return _generate(model, prompts, tokens, skipped, jnp.float32(temperature), nucleus, top_k, seed)


def _generate(model, prompts, tokens, skipped, temperature, top_p, top_k, seed):
    graphdef, params = nnx.split(model)
    lengths = np.array([len(prompt) for prompt in prompts])
    width = power_of_two(lengths.max())
    padded = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = prompt
    real = (np.arange(width) < lengths[:, None]).astype(np.int32)
    key, how = jax.random.key(seed), (temperature, top_p)
    capacity = power_of_two(lengths.max() + tokens)
    token, cache = _prefill(graphdef, params, padded, real, skipped, key, *how, capacity=capacity, top_k=top_k)
    yield np.asarray(token)
    for position in range(1, tokens):
        token, cache = decode_step(graphdef, params, token, cache, key, position, *how, top_k=top_k)
        yield np.asarray(token)
