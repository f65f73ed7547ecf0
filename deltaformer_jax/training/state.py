"""The training state as one plain pytree, and the sharding of each of its arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltaformer_jax.model_parts import ModelParts
from deltaformer_jax.sharding.mesh import also_over_data, partition, replicated
from deltaformer_jax.training.guard import Guard, RatioGuard, new_guard


class TrainState(NamedTuple):
    """params: nested dict of float32 arrays. opt_state: optax's, of the parameters that are trained. step: int32 [],
    the number of batches seen, with their updates made or skipped. guard: the statistics that decide which.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    guard: Guard | RatioGuard


def new_state(
    parts: ModelParts, params: Any, optimiser: optax.GradientTransformation, *, skip: str = "deviations"
) -> TrainState:
    """The state before the first batch. skip: optimizer.skip."""
    trained, _ = parts.divided(params)
    return TrainState(params, optimiser.init(trained), jnp.zeros((), jnp.int32), new_guard(skip))


def abstract_state(
    parts: ModelParts,
    optimiser: optax.GradientTransformation,
    mesh: Mesh,
    *,
    zero1: bool = False,
    skip: str = "deviations",
) -> tuple[TrainState, TrainState]:
    """(the state as ShapeDtypeStructs with shardings, the shardings alone). Nothing is allocated.

    What the optimiser keeps of a parameter has the parameter's sharding, and Adafactor's means over one of its axes
    that of the axes left. With `zero1` the former is cut over the mesh axis "data" too. The rest of the optimiser's
    state is replicated.
    """
    whole = replicated(mesh)
    shapes = jax.eval_shape(lambda params: new_state(parts, params, optimiser, skip=skip), parts.params)
    params_sharding = parameter_shardings(parts, mesh)
    trained, trained_sharding = parts.divided(parts.params)[0], parts.divided(params_sharding)[0]

    def like_parameter(kept: Any, param: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Any:
        if isinstance(kept, optax.MaskedNode):  # the parameter has another of Muon's two optimisers
            return kept
        if kept.shape != param.shape:
            return whole
        return also_over_data(sharding, param.shape) if zero1 else sharding

    def placed(node: Any, found: Any) -> Any:
        if not isinstance(node, optax.FactoredState):
            return found
        means = {
            name: jax.tree.map(_of_means(place, whole), getattr(node, name), trained, trained_sharding)
            for name, place in (("v_row", -1), ("v_col", -2))
        }
        return found._replace(**means)

    opt_sharding = optax.tree_map_params(
        optimiser,
        like_parameter,
        shapes.opt_state,
        trained,
        trained_sharding,
        transform_non_params=lambda _: whole,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    opt_sharding = jax.tree.map(
        placed, shapes.opt_state, opt_sharding, is_leaf=lambda node: isinstance(node, optax.FactoredState)
    )
    shardings = TrainState(params_sharding, opt_sharding, whole, jax.tree.map(lambda _: whole, shapes.guard))
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    return abstract, shardings


def parameter_shardings(parts: ModelParts, mesh: Mesh) -> Any:
    """The NamedSharding of each parameter."""
    return jax.tree.map(
        lambda leaf, axes: NamedSharding(mesh, partition(axes, leaf.shape, mesh)), parts.params, parts.axes
    )


def gradient_shardings(parts: ModelParts, of_params: Any, *, zero1: bool) -> Any:
    """The shardings of the trained parameters' gradient: theirs, or with `zero1` those of what the optimiser keeps."""
    of_trained, trained = parts.divided(of_params)[0], parts.divided(parts.params)[0]
    if not zero1:
        return of_trained
    return jax.tree.map(lambda sharding, leaf: also_over_data(sharding, leaf.shape), of_trained, trained)


def _of_means(place: int, whole: NamedSharding) -> Callable:
    """The sharding of a parameter's mean squares over one axis: the `place`-th of its axes in the order of their sizes.

    place: -1, the largest axis, for optax's v_row; -2 for its v_col. `whole` for a parameter of which no means are
    kept: optax then has an array of one number there.
    """

    def sharding(kept: jax.ShapeDtypeStruct, param: jax.ShapeDtypeStruct, of_param: NamedSharding) -> NamedSharding:
        if param.ndim < 2:
            return whole
        axis = int(np.argsort(param.shape)[place])
        if kept.shape != (*param.shape[:axis], *param.shape[axis + 1 :]):
            return whole
        return NamedSharding(of_param.mesh, PartitionSpec(*of_param.spec[:axis], *of_param.spec[axis + 1 :]))

    return sharding
