"""Sums over a batch and their gradient, each device for its own part: what is sent between devices is written here.

With devices along the mesh axes "data" and "fsdp", which split rows, and "context", which splits their tokens, and S_d
the sum over the part of device d,

    S = Σ_d S_d,        dS/dW = Σ_d dS_d/dW

Over "fsdp" a parameter's gradient is reduce-scattered where the layers use it (`sharding/shards.py`). Over "data" and
"context", and over "fsdp" for a parameter that is not cut, it is summed once, when all parts of the batch have been
added up. The mesh axis "tensor" is left to the compiler and to the ops. S_d depends on the tokens of earlier devices of
"context": their part of dS_d/dW is computed where they are, by the transposes of the ops' collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltaformer_jax.layers.embedding import Embedding
from deltaformer_jax.model import LanguageModel
from deltaformer_jax.model_parts import ModelParts, merge
from deltaformer_jax.sharding import CONTEXT_AXIS, ROW_AXES
from deltaformer_jax.sharding.mesh import BATCH, rows
from deltaformer_jax.sharding.shards import SHARD_AXIS, all_shards

Sums = Callable[[nnx.GraphDef, Any, dict[str, jax.Array]], tuple[Any, Any]]


def over_rows(mesh: Mesh, shardings: Any, parts: ModelParts, sums: Sums) -> Callable:
    """(params, batch) -> sums(graphdef, params, batch) = (numbers, gradient), summed over all rows of the batch.

    sums: called for a device's own rows, with the model's graphdef. Its numbers are a pytree of scalars, its gradient
    one of the parameters' structure. `shardings`: the parameters' NamedShardings, which are the gradient's too.
    """
    if rows(mesh) * mesh.shape[CONTEXT_AXIS] == 1:
        return lambda params, batch: sums(parts.graphdef, params, batch)
    summed, uncut = (*ROW_AXES, CONTEXT_AXIS), ("data", CONTEXT_AXIS)
    specs = jax.tree.map(_of_rows, shardings)
    cuts = jax.tree.map(_cut, specs, parts.params)
    late = _gathered_late(merge(parts, parts.params))
    graphdef = _marked(parts, {path: cut for path, cut in _flat(cuts) if cut and path[0] in late})

    def local(params, batch):
        def of_shards(params):  # what no layer gathers by itself is gathered before
            return jax.tree_util.tree_map_with_path(
                lambda path, x, cut: all_shards(x, cut) if cut and path[0].key not in late else x, params, cuts
            )

        whole, pull = jax.vjp(of_shards, params)
        numbers, gradient = sums(graphdef, whole, batch)
        (gradient,) = pull(gradient)
        gradient = jax.tree.map(lambda g, cut: lax.psum(g, uncut if cut else summed), gradient, cuts)
        return jax.tree.map(lambda x: lax.psum(x, summed), numbers), gradient

    # A kernel is only compiled where no axis is left to the compiler: axes of one device are not left to it.
    axes = {*summed, *(name for name, size in mesh.shape.items() if size == 1)}
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, BATCH),
        out_specs=(PartitionSpec(), specs),
        axis_names=axes,
        # The gradient is that of a device's own sum; shard_map's check would sum it over devices at every use.
        check_vma=False,
    )


def over_tokens(mesh: Mesh, function: Callable) -> Callable:
    """function(params, batch) -> arrays [B, T], each device of the mesh axis "context" for its own tokens.

    The other axes, and with them the parameters, are left to the compiler and to the ops.
    """
    if mesh.shape[CONTEXT_AXIS] == 1:
        return function
    part = PartitionSpec(None, CONTEXT_AXIS)
    axes = {CONTEXT_AXIS, *(name for name, size in mesh.shape.items() if size == 1)}
    return jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec(), part), out_specs=part, axis_names=axes, check_vma=False
    )


def _of_rows(sharding: NamedSharding) -> PartitionSpec:
    """The part of a parameter's spec that shard_map is told: the axes that rows are split over."""
    return PartitionSpec(*(axis if axis in ROW_AXES else None for axis in sharding.spec))


def _cut(spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> int:
    """The dimension cut over SHARD_AXIS, counted from the last: −1, −2, ...; 0: none."""
    return spec.index(SHARD_AXIS) - leaf.ndim if SHARD_AXIS in spec else 0


def _gathered_late(model: nnx.Module) -> set[str]:
    """The parts of a model whose layers gather their parameters themselves, one layer at a time."""
    ours = {"blocks"} if type(model).hidden is LanguageModel.hidden else set()
    plain = type(model.embedding) is Embedding and type(model).logits is LanguageModel.logits
    return ours | {"embedding"} if plain else ours


def _marked(parts: ModelParts, cuts: dict[tuple, int]) -> nnx.GraphDef:
    """The model's graphdef with the metadata `cut` at the parameters of these paths."""
    model = merge(parts, parts.params)
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        if path in cuts:
            parameter.set_metadata(cut=cuts[path])
    return nnx.split(model)[0]


def _flat(tree: Any, path: tuple = ()):
    for key, child in tree.items():
        yield from _flat(child, (*path, key)) if isinstance(child, dict) else [((*path, key), child)]
