"""A model split into a static graph and its parameters, a plain pytree of arrays for jax.jit and optax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.model import LanguageModel


class ModelParts(NamedTuple):
    """The static graph of a model, and descriptions of its parameters, which need not be allocated.

    `params`, `axes` and `decay` are nested dicts of one structure. Their leaves are, for each parameter: its
    ShapeDtypeStruct; the tuple of its axis names; whether weight decay applies to it (bool).
    """

    graphdef: nnx.GraphDef
    params: Any
    axes: Any
    decay: Any


def model_parts(config: ModelConfig, make_model: Callable[..., nnx.Module] = LanguageModel) -> ModelParts:
    """Trace the model's construction; no parameter is allocated. Raises ValueError if the model refuses the config."""
    graphdef, variables = jax.eval_shape(lambda: _split(config, make_model, jax.random.key(0)))
    axes, decay = {}, {}
    for path, variable in nnx.to_flat_state(variables):
        metadata = variable.get_metadata()
        axes[path] = tuple(metadata.get("axes", ()))
        # Count names, not dimensions: the stacked layer axis has no name. A stacked norm gain has two dimensions, one
        # name, and no decay.
        decay[path] = bool(metadata.get("decay", len(axes[path]) >= 2))
    params = nnx.to_pure_dict(variables)
    return ModelParts(graphdef, params, _like(params, axes), _like(params, decay))


def new_params(config: ModelConfig, make_model: Callable[..., nnx.Module], key: jax.Array) -> Any:
    """Initial parameters drawn from `key`: a nested dict with the structure and shapes of `ModelParts.params`."""
    return nnx.to_pure_dict(_split(config, make_model, key)[1])


def _split(config: ModelConfig, make_model: Callable[..., nnx.Module], key: jax.Array) -> tuple[nnx.GraphDef, Any]:
    return nnx.split(make_model(config, rngs=nnx.Rngs(key)))


def _like(tree: Any, values: dict[tuple, Any], path: tuple = ()) -> Any:
    if isinstance(tree, dict):
        return {key: _like(child, values, (*path, key)) for key, child in tree.items()}
    return values[path]


def params_of(model: nnx.Module) -> Any:
    """The parameters of a model: nested dicts of arrays, as `ModelParts.params`."""
    return nnx.to_pure_dict(nnx.split(model)[1])


def merge(parts: ModelParts, params: Any) -> nnx.Module:
    """The model with the given parameters, which may be arrays, tracers or ShapeDtypeStructs."""
    return nnx.merge(parts.graphdef, nnx.State(params))
