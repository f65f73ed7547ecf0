"""A model split into a static graph and its parameters, a plain pytree of arrays for jax.jit and optax."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx

from deltaformer_jax.config import ModelConfig
from deltaformer_jax.layers.linear import Adapter
from deltaformer_jax.model import LanguageModel

Path = tuple[Any, ...]


class ModelParts(NamedTuple):
    """The static graph of a model, and descriptions of its parameters, which need not be allocated.

    `params`, `axes` and `decay` are nested dicts of one structure. Their leaves are, for each parameter: its
    ShapeDtypeStruct; the tuple of its axis names; whether weight decay applies to it (bool). `trained`: the paths of
    the adapters, which alone are trained; None for a model without adapters, of which all parameters are.
    """

    graphdef: nnx.GraphDef
    params: Any
    axes: Any
    decay: Any
    trained: frozenset[Path] | None = None

    def divided(self, tree: Any) -> tuple[Any, Any]:
        """(the leaves of the trained parameters, the others) of a tree like `params`. `joined` is the inverse."""
        if self.trained is None:
            return tree, {}
        leaves = dict(flat(tree))
        trained = {path: leaf for path, leaf in leaves.items() if path in self.trained}
        return nested(trained), nested({path: leaf for path, leaf in leaves.items() if path not in trained})


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
    trained = frozenset(path for path, variable in nnx.to_flat_state(variables) if isinstance(variable, Adapter))
    return ModelParts(graphdef, params, _like(params, axes), _like(params, decay), trained or None)


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


def flat(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, leaf) of every leaf of nested dicts."""
    for key, child in tree.items():
        if isinstance(child, dict):
            yield from flat(child, (*path, key))
        else:
            yield (*path, key), child


def nested(leaves: dict[Path, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for (*outer, last), leaf in leaves.items():
        level = tree
        for key in outer:
            level = level.setdefault(key, {})
        level[last] = leaf
    return tree


def joined(*trees: Any) -> Any:
    """Nested dicts with the leaves of all of these; no two have a leaf at the same place."""
    return nested({path: leaf for tree in trees for path, leaf in flat(tree)})
