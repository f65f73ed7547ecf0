"""LongReD's terms: how far a model has moved from its teacher, the model before its context was extended.

With cos the cosine of two vectors, means over real tokens, h_l the residual stream after layer l before the final norm,
and h the final norm's output:

    L_short = Σ_{l in S} (1 − mean cos(h_l, h_l of the teacher))      short rows, usual positions
    L_s2l   = 1 − mean cos(h(p̂), h of the teacher(p))                  rows of the teacher's length; p̂: `stretched.py`

The step follows the gradient of

    CE(long rows) + (b/a) alpha_short L_short + (c/a) alpha_s2l L_s2l        objective.cycle = a, b, c

as the published code does, whose steps average the gradients of a, b and c parts of one term each. The teacher has its
own rotary embedding and gets no gradient. Cosines are float32; a vector of zeros has the cosine 0.

Source: Dong et al., "LongReD", arXiv 2502.07365; known from its code and from notes on its tables.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from deltaformer_jax.config import Config
from deltaformer_jax.model_parts import ModelParts
from deltaformer_jax.ops import token_positions
from deltaformer_jax.sharding.mesh import replicated
from deltaformer_jax.training.objectives.rows import SHORT, STRETCHED, Rows
from deltaformer_jax.training.objectives.stretched import stretched
from deltaformer_jax.training.on_mesh.drift import distance
from deltaformer_jax.training.on_mesh.over_rows import over_tokens
from deltaformer_jax.training.step import Beside, mean_and_gradient

# Sets these draws apart from others that are made from the same seed.
_DRAWS = 0x10F6


class Teacher(NamedTuple):
    """What a step needs beside state and batch. params: as of the student. layers int32 [N]: after which the streams of
    the short rows are compared."""

    params: Any
    layers: jax.Array


def restoring(
    config: Config, beside: dict[str, Rows], parts: ModelParts, teacher_parts: ModelParts, mesh: Mesh, of_params: Any
) -> Beside:
    """The two terms for a step, which then also takes a `Teacher`. of_params: the shardings of its parameters.

    Metrics: short_distance, L_short / N, and s2l_distance, L_s2l, both before the update.
    Cost: a forward pass of the teacher and a training step of the student, without logits, for the rows of each term.
    Memory: the streams of all layers of both for a part of a batch's short rows.
    """
    objective, accumulation = config.objective, config.optimizer.accumulation_steps
    long, short, s2l = objective.shares()

    def added(gradient, state, batch, teacher: Teacher, *, over):
        more = {}
        gradient_of = functools.partial(mean_and_gradient, accumulation_steps=accumulation, parts=parts, over=over)
        if SHORT in beside:
            rows, layers = batch[SHORT], teacher.layers
            streams = over_tokens(mesh, teacher_parts, functools.partial(_streams, layers))(teacher.params, rows)
            rows = {**rows, "teacher": streams}
            value, of_term = gradient_of(functools.partial(_short_distance, layers), params=state.params, rows=rows)
            gradient = _plus(gradient, objective.alpha_short * short / long, of_term)
            more["short_distance"] = value / layers.shape[0]
        if STRETCHED in beside:
            rows = batch[STRETCHED]
            usual = token_positions(rows["segment_ids"], *rows["tokens"].shape)
            key = jax.random.fold_in(jax.random.key(config.run.seed ^ _DRAWS), state.step)
            places = stretched(key, *usual.shape, config.data.sequence_length, objective.skip)
            rows = {
                **rows,
                "positions": jnp.take_along_axis(places, usual, axis=1),
                "teacher": over_tokens(mesh, teacher_parts, _state)(teacher.params, rows),
            }
            value, of_term = gradient_of(_stretched_distance, params=state.params, rows=rows)
            gradient = _plus(gradient, objective.alpha_s2l * s2l / long, of_term)
            more["s2l_distance"] = value
        return gradient, more

    return Beside((Teacher(of_params, replicated(mesh)),), added)


def _plus(gradient: Any, weight: float, other: Any) -> Any:
    return jax.tree.map(lambda a, b: a + weight * b, gradient, other)


def _after(before, after, real):
    return after


def _streams(layers: jax.Array, graphdef: nnx.GraphDef, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    """The streams after `layers`: [B, T, N, d]."""
    model = nnx.merge(graphdef, nnx.State(params))
    _, streams = model.look(rows["tokens"], _after, segment_ids=rows["segment_ids"])
    return jnp.moveaxis(streams[layers], 0, 2)


def _state(graphdef: nnx.GraphDef, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
    """The final norm's output [B, T, d]."""
    model = nnx.merge(graphdef, nnx.State(params))
    return model.hidden(rows["tokens"], segment_ids=rows["segment_ids"])[0]


def _short_distance(layers: jax.Array, graphdef: nnx.GraphDef, params: Any, rows: dict[str, jax.Array]):
    streams = _streams(layers, graphdef, params, rows)
    apart = distance(streams, rows["teacher"], (rows["segment_ids"] > 0)[..., None])
    return jnp.sum(apart), ()


def _stretched_distance(graphdef: nnx.GraphDef, params: Any, rows: dict[str, jax.Array]):
    model = nnx.merge(graphdef, nnx.State(params))
    found, _ = model.hidden(rows["tokens"], segment_ids=rows["segment_ids"], positions=rows["positions"])
    return jnp.sum(distance(found, rows["teacher"], rows["segment_ids"] > 0)), ()
