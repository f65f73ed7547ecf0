"""The state of a run as one plain pytree, and how to make it in place, already spread over the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from deltaformer_jax.config import Config, ModelConfig
from deltaformer_jax.sharding.mesh import partition, replicated
from deltaformer_jax.training.guard import Guard, new_guard
from deltaformer_jax.training.optimiser import make_optimiser


class TrainState(NamedTuple):
    """params: nested dict of float32 arrays; opt_state: optax's; step: int32 [], the number of batches seen, made into
    an update or skipped; guard: which is which."""

    params: Any
    opt_state: Any
    step: jax.Array
    guard: Guard


class ModelParts(NamedTuple):
    """A model cut in two at the edge: its static graph, and what is known of its parameters before they exist.

    `params`, `axes` and `decay` are nested dicts of the same structure: ShapeDtypeStruct, tuple of axis names, bool.
    """

    graphdef: nnx.GraphDef
    params: Any
    axes: Any
    decay: Any


def _make_model(config: ModelConfig, key: jax.Array) -> tuple[nnx.GraphDef, Any]:
    from deltaformer_jax.model import LanguageModel

    return nnx.split(LanguageModel(config, rngs=nnx.Rngs(key)))


def model_parts(config: ModelConfig) -> ModelParts:
    """Trace the model's construction; nothing is allocated. Raises the model's own ValueError for a bad config."""
    graphdef, variables = jax.eval_shape(lambda: _make_model(config, jax.random.key(0)))
    axes, decay = {}, {}
    for path, variable in nnx.to_flat_state(variables):
        metadata = variable.get_metadata()
        axes[path] = tuple(metadata.get("axes", ()))
        # The stacked layer axis is not among the names: a stacked norm scale has one name and two dimensions.
        decay[path] = bool(metadata.get("decay", len(axes[path]) >= 2))
    params = nnx.to_pure_dict(variables)
    return ModelParts(graphdef, params, _like(params, axes), _like(params, decay))


def _like(tree: Any, values: dict[tuple, Any], path: tuple = ()) -> Any:
    if isinstance(tree, dict):
        return {key: _like(child, values, (*path, key)) for key, child in tree.items()}
    return values[path]


def merge(parts: ModelParts, params: Any) -> nnx.Module:
    """The model with these parameters (arrays, tracers or ShapeDtypeStructs)."""
    return nnx.merge(parts.graphdef, nnx.State(params))


def count_parameters(parts: ModelParts) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(parts.params))


def abstract_state(config: Config, parts: ModelParts, mesh: Mesh) -> tuple[TrainState, TrainState]:
    """(the state as ShapeDtypeStructs that carry their shardings, the shardings alone); nothing is allocated.

    Adam's moments get exactly their parameter's sharding, everything else of the optimiser's state is replicated.
    """
    optimiser = make_optimiser(config.optimizer, parts.decay)
    whole = replicated(mesh)
    params_sharding = jax.tree.map(
        lambda leaf, axes: NamedSharding(mesh, partition(axes, leaf.shape, mesh)), parts.params, parts.axes
    )
    opt_state = jax.eval_shape(optimiser.init, parts.params)
    opt_sharding = optax.tree_map_params(
        optimiser, lambda _, sharding: sharding, opt_state, params_sharding, transform_non_params=lambda _: whole
    )
    guard = jax.eval_shape(new_guard)
    shardings = TrainState(params_sharding, opt_sharding, whole, jax.tree.map(lambda _: whole, guard))
    shapes = TrainState(parts.params, opt_state, jax.ShapeDtypeStruct((), jnp.int32), guard)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    return abstract, shardings


def create_state(config: Config, parts: ModelParts, shardings: TrainState) -> TrainState:
    """A new state from run.seed, made by one compiled program straight into its shardings: no device ever holds it all.

    The values depend on the seed alone, not on the mesh.
    """
    optimiser = make_optimiser(config.optimizer, parts.decay)

    def create(key: jax.Array) -> TrainState:
        params = nnx.to_pure_dict(_make_model(config.model, key)[1])
        return TrainState(params, optimiser.init(params), jnp.zeros((), jnp.int32), new_guard())

    return jax.jit(create, out_shardings=shardings)(jax.random.key(config.run.seed))
