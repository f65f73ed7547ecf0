"""A model cut in two at the edge: a static graph, and parameters as a plain pytree that jax.jit and optax take."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.model import LanguageModel


class ModelParts(NamedTuple):
    """The static graph of a model, and what is known of its parameters before they exist.

    `params`, `axes` and `decay` are nested dicts of the same structure: ShapeDtypeStruct, tuple of axis names, bool.
    """

    graphdef: nnx.GraphDef
    params: Any
    axes: Any
    decay: Any


def model_parts(config: ModelConfig, make_model: Callable[..., nnx.Module] = LanguageModel) -> ModelParts:
    """Trace the model's construction; nothing is allocated. Raises the model's own ValueError for a bad config."""
    graphdef, variables = jax.eval_shape(lambda: _split(config, make_model, jax.random.key(0)))
    axes, decay = {}, {}
    for path, variable in nnx.to_flat_state(variables):
        metadata = variable.get_metadata()
        axes[path] = tuple(metadata.get("axes", ()))
        # The stacked layer axis is not among the names: a stacked norm scale has one name and two dimensions.
        decay[path] = bool(metadata.get("decay", len(axes[path]) >= 2))
    params = nnx.to_pure_dict(variables)
    return ModelParts(graphdef, params, _like(params, axes), _like(params, decay))


def new_params(config: ModelConfig, make_model: Callable[..., nnx.Module], key: jax.Array) -> Any:
    """The parameters of a new model, drawn from `key`: the nested dict that `ModelParts.params` gives the shapes of."""
    return nnx.to_pure_dict(_split(config, make_model, key)[1])


def _split(config: ModelConfig, make_model: Callable[..., nnx.Module], key: jax.Array) -> tuple[nnx.GraphDef, Any]:
    return nnx.split(make_model(config, rngs=nnx.Rngs(key)))


def _like(tree: Any, values: dict[tuple, Any], path: tuple = ()) -> Any:
    if isinstance(tree, dict):
        return {key: _like(child, values, (*path, key)) for key, child in tree.items()}
    return values[path]


def merge(parts: ModelParts, params: Any) -> nnx.Module:
    """The model with these parameters (arrays, tracers or ShapeDtypeStructs)."""
    return nnx.merge(parts.graphdef, nnx.State(params))
