"""Statistics of every layer at some steps: norms of parameters and gradients, sizes of activations.

They are computed by a separate program, only on request. The training step is the same with and without it.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import ModelParts
from deltaformer_jax.sharding.mesh import on_mesh, replicated
from deltaformer_jax.training.on_mesh.over_rows import axes_of_tokens, over_rows, over_tokens
from deltaformer_jax.training.state import gradient_shardings, parameter_shardings
from deltaformer_jax.training.step import loss_and_gradient


def make_statistics_step(parts: ModelParts, mesh: Mesh, accumulation_steps: int) -> Callable:
    """jit of (params, batch) -> statistics, float32, replicated to every host. `as_record` converts them to a record.

    parameter_norm, gradient_norm: for each array the 2-norm over all axes but the one of stacked layers. The gradient
    is that of the batch's mean loss, before clipping.
    activation: rms and maximum of the residual stream after each block, over real tokens and features. Only every
    accumulation_steps-th row is used, as many as a training step has in memory at once.
    Cost: a forward and a backward pass, and one more forward pass.
    """

    of_gradient = gradient_shardings(parts, parameter_shardings(parts, mesh), zero1=False)
    over = functools.partial(over_rows, mesh, of_gradient)

    def sizes(graphdef, params, batch):
        part = jax.tree.map(lambda x: x.reshape(-1, accumulation_steps, *x.shape[1:])[:, 0], batch)
        model = nnx.merge(graphdef, nnx.State(params))
        return activations(model, part["tokens"], part["segment_ids"], over=axes_of_tokens(mesh))[1]

    def step(params, batch: dict[str, jax.Array]) -> dict[str, Any]:
        _, gradient, _ = loss_and_gradient(parts, params, batch, accumulation_steps, over=over)
        activation = over_tokens(mesh, parts, sizes, PartitionSpec())(params, batch)
        return {"parameter_norm": _norms(params), "gradient_norm": _norms(gradient), "activation": activation}

    return jax.jit(on_mesh(mesh, step), out_shardings=replicated(mesh))


def activations(
    model: LanguageModel, tokens: jax.Array, segment_ids: jax.Array, *, over: tuple[str, ...] = ()
) -> tuple[jax.Array, dict[str, Any]]:
    """(`model.hidden`, sizes): the forward pass, with the size of each layer's output.

    sizes: {"embedding": (rms, max), "layers": (rms, max) with an axis over the layers}. `over`: the mesh axes over
    whose devices the tokens are split, inside a shard_map over them; the sizes are those of all tokens.
    """
    summed = lambda x: jax.lax.psum(x, over) if over else x

    def size(x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.where(real[..., None], x.astype(jnp.float32), 0.0)
        count = jnp.maximum(summed(jnp.sum(real)), 1) * x.shape[-1]
        most = jnp.max(jnp.abs(x))
        return jnp.sqrt(summed(jnp.sum(x * x)) / count), jax.lax.pmax(most, over) if over else most

    hidden, layers = model.look(tokens, lambda before, after, real: size(after, real), segment_ids=segment_ids)
    return hidden, {"embedding": size(model.embedding(tokens, segment_ids), segment_ids > 0), "layers": layers}


def _norms(params: Any) -> Any:
    def norm(path, x):
        axes = tuple(range(1 if _name(path).startswith("blocks.") else 0, x.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes))

    return jax.tree_util.tree_map_with_path(norm, params)


def _name(path: tuple) -> str:
    return ".".join(str(getattr(key, "key", key)) for key in path)


def as_record(statistics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{"gradient_norm": {"layers.07.mixer.output": 0.1, ..., "embedding.table": 0.2}, "activation_rms": {...}, ...}.

    Layers are numbered from 0, the one next to the embedding, with leading zeros, so that sorted names are in order.
    """
    activation = statistics["activation"]
    layer_rms, layer_max = (np.asarray(values, np.float64) for values in activation["layers"])
    digits = len(str(len(layer_rms) - 1))
    pattern = len(statistics["parameter_norm"]["blocks"])
    record: dict[str, dict[str, float]] = {}
    for kind in ("parameter_norm", "gradient_norm"):
        named = record[kind] = {}
        for path, value in jax.tree_util.tree_leaves_with_path(statistics[kind]):
            name = _name(path)
            if not name.startswith("blocks."):
                named[name] = float(value)
                continue
            _, entry, rest = name.split(".", 2)
            for period, norm in enumerate(np.asarray(value, np.float64)):
                named[f"layers.{period * pattern + int(entry):0{digits}}.{rest}"] = float(norm)
        record[kind] = dict(sorted(named.items()))
    for kind, at_start, layers in (
        ("activation_rms", activation["embedding"][0], layer_rms),
        ("activation_max", activation["embedding"][1], layer_max),
    ):
        record[kind] = {"embedding": float(at_start)}
        record[kind] |= {f"layers.{i:0{digits}}": float(value) for i, value in enumerate(layers)}
    return record
