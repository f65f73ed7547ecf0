"""The training state as one plain pytree, and the sharding of each of its arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from deltaformer_jax.model_parts import ModelParts
from deltaformer_jax.sharding.mesh import partition, replicated
from deltaformer_jax.training.guard import Guard, new_guard


class TrainState(NamedTuple):
    """params: nested dict of float32 arrays. opt_state: optax's. step: int32 [], the number of batches seen, with their
    updates made or skipped. guard: the statistics that decide which.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    guard: Guard


def new_state(params: Any, optimiser: optax.GradientTransformation) -> TrainState:
    """The state before the first batch."""
    return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32), new_guard())


def abstract_state(
    parts: ModelParts, optimiser: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, TrainState]:
    """(the state as ShapeDtypeStructs with shardings, the shardings alone). Nothing is allocated.

    Adam's moments have the sharding of their parameter. The rest of the optimiser's state is replicated.
    """
    whole = replicated(mesh)
    shapes = jax.eval_shape(lambda params: new_state(params, optimiser), parts.params)
    params_sharding = jax.tree.map(
        lambda leaf, axes: NamedSharding(mesh, partition(axes, leaf.shape, mesh)), parts.params, parts.axes
    )
    opt_sharding = optax.tree_map_params(
        optimiser, lambda _, sharding: sharding, shapes.opt_state, params_sharding, transform_non_params=lambda _: whole
    )
    shardings = TrainState(params_sharding, opt_sharding, whole, jax.tree.map(lambda _: whole, shapes.guard))
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    return abstract, shardings
