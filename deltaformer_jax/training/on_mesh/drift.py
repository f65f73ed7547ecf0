"""How far a model has moved from another one of the same architecture, its teacher, layer by layer on the same rows.

    Sim_l = mean cos(h_l, h_l of the teacher)                         h_l: the residual stream after layer l
    KL_l  = mean Σ_i p_i log(p_i / q_i)                               p, q: what a token's attention gives token i, in
                                                                      the teacher and in the model

with means over real tokens, for KL over heads too. DeltaFormer has a KL of its read and one of its write, each where
its similarity is softmax; the write's tokens are those that see an earlier one. Layers without softmax attention have
none, nor has a read with a position bias.
Source: the two measures of "LongReD", Dong et al., arXiv 2502.07365; the write's is this library's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from deltaformer_jax.layers.mixers.visible import separators_of
from deltaformer_jax.layers.padding import token_positions
from deltaformer_jax.model_parts import ModelParts, merge
from deltaformer_jax.sharding.mesh import on_mesh, replicated
from deltaformer_jax.sharding.shards import gathered
from deltaformer_jax.training.on_mesh.over_rows import over_tokens

# How many attention weights of one layer may exist at once: 256 MB of float32.
_WEIGHTS = 2**26

Model = tuple[ModelParts, Any]  # with its parameters


class Drift(NamedTuple):
    """Of each layer, float64 [num_layers]; NaN where a layer has no such attention."""

    similarity: np.ndarray
    read: np.ndarray
    write: np.ndarray


def drift(mesh: Mesh, teacher: Model, model: Model, batches: Iterable[dict[str, jax.Array]]) -> Drift:
    """The means of the measures over batches of one shape on the devices: tokens and segment_ids [B, T].

    Cost: a forward pass of both without logits, and their T × T attention weights once more. Memory: streams, queries
    and keys of all layers of both.
    """
    models = (teacher, model)
    mixers = [block.mixer for block in merge(model[0], model[0].params).blocks]
    windows = [getattr(mixer, "window", None) for mixer in mixers]

    def measure(theirs, ours, rows):
        seen = [over_tokens(mesh, parts, _seen)(params, rows) for (parts, _), params in zip(models, (theirs, ours))]
        ids = rows["segment_ids"]
        streams, compared = zip(*seen)
        similarity = 1.0 - _mean_distance(*streams, ids > 0)
        behind = [_behind(mixer, keep, ids) for mixer, keep in zip(mixers, separators_of(mixers, rows["tokens"]))]
        kl = [
            {kind: _by_period(one[kind], other[kind], ids, kind == "write", *sees) for kind in one}
            for one, other, *sees in zip(*compared, windows, behind)  # for each entry of the pattern
        ]
        return similarity, kl

    step = jax.jit(on_mesh(mesh, measure), out_shardings=replicated(mesh))
    found = []
    for batch in batches:
        rows = {name: batch[name] for name in ("tokens", "segment_ids")}
        similarity, kl = jax.device_get(step(teacher[1], model[1], rows))
        kinds = (_by_layer([one.get(kind) for one in kl], len(similarity)) for kind in ("read", "write"))
        found.append((np.asarray(similarity, np.float64), *kinds))
    return Drift(*np.mean(found, axis=0))


def _by_layer(of_entries: list[np.ndarray | None], layers: int) -> np.ndarray:
    """[num_layers] from [periods] of each entry of the pattern; NaN for an entry of None."""
    values = np.full((layers // len(of_entries), len(of_entries)), np.nan)
    for i, one in enumerate(of_entries):
        if one is not None:
            values[:, i] = one
    return values.reshape(-1)


def divergence(mesh: Mesh, teacher: Model, model: Model, batch: dict[str, jax.Array]) -> np.ndarray:
    """The KL of each layer's attention, read and write added, float64 [num_layers]; 0 for a layer without it.

    Raises ValueError, naming objective.layers, if no layer has any.
    """
    found = drift(mesh, teacher, model, [batch])
    both = np.stack([found.read, found.write])
    if np.isnan(both).all():
        raise ValueError(
            "objective.layers = 'kl:N': no layer of this model has softmax attention; give uniform:N, all, last or "
            "numbers"
        )
    return np.nansum(both, axis=0)


def _seen(graphdef: nnx.GraphDef, params: Any, rows: dict[str, jax.Array]):
    """(the streams after all layers [B, T, num_layers, d], for each entry of the pattern what its attention compares).

    The latter: {"read" or "write": {name: [B, T, periods, ...]}}, see the mixers' `compared`.
    """
    model, ids = nnx.merge(graphdef, nnx.State(params)), rows["segment_ids"]
    _, (before, after) = model.look(rows["tokens"], _both, segment_ids=ids)
    positions = token_positions(ids, *ids.shape)
    by_entry = before.reshape(model.periods, len(model.blocks), *before.shape[1:])

    def compared(block, x):
        block = gathered(block, model.embedding.dtype)
        if not hasattr(block.mixer, "compared"):
            return {}
        given = x if block.norms_after else block.mixer_norm(x)
        return block.mixer.compared(given, segment_ids=ids, positions=positions)

    found = [
        jax.lax.map(lambda given: compared(*given), (block, by_entry[:, i])) for i, block in enumerate(model.blocks)
    ]
    return jnp.moveaxis(after, 0, 2), jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), found)


def _both(before, after, real):
    return before, after


def _mean_distance(a: jax.Array, b: jax.Array, real: jax.Array) -> jax.Array:
    """The mean of 1 − cos of [B, T, L, d] over real tokens, [L]."""
    return jnp.sum(distance(a, b, real[..., None]), axis=(0, 1)) / jnp.maximum(jnp.sum(real), 1)


def distance(a: jax.Array, b: jax.Array, real: jax.Array) -> jax.Array:
    """1 − cos(a, b) along the last axis, in float32; 1 where one of them is 0, and 0 where `real` is False."""
    a, b = (jnp.where(real[..., None], x.astype(jnp.float32), 0.0) for x in (a, b))
    lengths = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    there = lengths > 0
    cosine = jnp.where(there, jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(jnp.where(there, lengths, 1.0)), 0.0)
    return jnp.where(real, 1.0 - cosine, 0.0)


def _behind(mixer: nnx.Module, keep: jax.Array | None, ids: jax.Array) -> jax.Array | None:
    """bool [B, T]: the tokens that are seen behind the mixer's window; None without any. keep: its separators."""
    initial = getattr(mixer, "initial_tokens", 0)
    if not initial:
        return keep
    first = token_positions(ids, *ids.shape) < initial
    return first if keep is None else first | keep


def _by_period(
    one: dict, other: dict, ids: jax.Array, strict: bool, window: int | None, behind: jax.Array | None
) -> jax.Array:
    """The divergence of each period's attention: arrays [B, T, periods, ...] -> [periods]."""
    first = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (one, other))
    return jax.lax.map(lambda given: _divergence(*given, ids, strict, window, behind), first)


def _divergence(
    one: dict, other: dict, ids: jax.Array, strict: bool, window: int | None, behind: jax.Array | None
) -> jax.Array:
    """Mean KL over heads and over the real tokens that see some token, float32 []. strict: not the token itself. What a
    sink takes is left out."""
    rows, length = ids.shape
    heads = one["query"].shape[2]
    size = max(1, min(length, _WEIGHTS // (rows * heads * length)))
    pieces = -(-length // size)

    def piece(places):
        ahead = places[:, None] - jnp.arange(length)
        seen = (ahead < (window or length))[None]
        if behind is not None:
            seen = seen | behind[:, None]
        inside = ((ahead >= strict) & (places[:, None] < length))[None] & seen
        places = jnp.minimum(places, length - 1)
        own = ids[:, places]
        visible = (inside & (own[:, :, None] == ids[:, None]) & (own > 0)[:, :, None])[:, None]
        p, q = (_log_weights(given, places, visible) for given in (one, other))
        apart = jnp.where(visible, jnp.exp(p) * (p - q), 0.0)
        return jnp.sum(apart), jnp.sum(jnp.any(visible, axis=-1))

    total, count = jax.lax.map(piece, jnp.arange(pieces * size).reshape(pieces, size))
    return jnp.sum(total) / (heads * jnp.maximum(jnp.sum(count), 1))


def _log_weights(given: dict[str, jax.Array], places: jax.Array, visible: jax.Array) -> jax.Array:
    """log softmax of the scores of the tokens at `places`: float32 [B, H, S, T], 0 where not visible."""
    query, key = (given[name].astype(jnp.float32) for name in ("query", "key"))
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    scores = jnp.einsum("bshk,bthk->bhst", query[:, places], key)
    if "log_decay" in given:
        summed = jnp.moveaxis(jnp.cumsum(given["log_decay"].astype(jnp.float32), axis=1), 1, 2)
        scores += summed[:, :, places, None] - summed[:, :, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    most = jnp.max(scores, axis=-1, keepdims=True)
    most = jnp.where(jnp.isfinite(most), most, 0.0)
    total = jnp.sum(jnp.exp(scores - most), axis=-1, keepdims=True)
    if "sink" in given:
        total += jnp.exp(jnp.moveaxis(given["sink"][:, :1], 1, 2)[..., None].astype(jnp.float32) - most)
    return jnp.where(visible, scores - most - jnp.log(jnp.where(total > 0, total, 1.0)), 0.0)
