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
from deltaformer_jax.model_parts import ModelParts, flat, joined, merge, nested
from deltaformer_jax.sharding import CONTEXT_AXIS, ROW_AXES
from deltaformer_jax.sharding.mesh import BATCH, rows
from deltaformer_jax.sharding.shards import SHARD_AXIS, all_shards, sums_in_shards

Sums = Callable[[nnx.GraphDef, Any, dict[str, jax.Array]], tuple[Any, Any]]


def over_rows(mesh: Mesh, shardings: Any, of_gradient: Any, parts: ModelParts, sums: Sums) -> Callable:
    """(params, batch) -> sums(graphdef, params, batch) = (numbers, gradient), summed over all rows of the batch.

    sums: called for a device's own rows, with the model's graphdef. Its numbers are a pytree of scalars, its gradient
    that of the trained parameters. `shardings`: the parameters' NamedShardings. `of_gradient`: the gradient's, which
    may be cut over "data" too: it is then reduce-scattered over that axis.
    """
    if rows(mesh) * mesh.shape[CONTEXT_AXIS] == 1:
        return lambda params, batch: sums(parts.graphdef, params, batch)
    summed = (*ROW_AXES, CONTEXT_AXIS)
    specs = jax.tree.map(_of_rows, shardings)
    cuts = dict(flat(jax.tree.map(_cut, specs, parts.params, is_leaf=_is_spec)))
    late = _gathered_late(merge(parts, parts.params))
    columns = {path: column or None for path, column in flat(jax.tree.map(_columns, shardings, parts.params))}
    graphdef = _marked(parts, late, cuts, columns)
    gradient_specs = jax.tree.map(_of_rows, of_gradient)
    over_data = {path: _dimension(spec, "data") for path, spec in flat(gradient_specs)}

    def of_shards(params):  # what no layer gathers by itself is gathered before
        leaves = dict(flat(params))
        early = [path for path in leaves if cuts[path] and path[0] not in late]
        if early:
            leaves |= zip(early, all_shards(*([of[path] for path in early] for of in (leaves, cuts, columns))))
        return nested(leaves)

    def local(params, batch):
        trained, frozen = parts.divided(params)
        whole, pull = jax.vjp(of_shards, trained)
        numbers, gradient = sums(graphdef, joined(whole, of_shards(frozen)), batch)
        (gradient,) = pull(gradient)
        leaves = dict(flat(gradient))
        split = [path for path, axis in over_data.items() if axis is not None]
        wholes, axes, beside = ([of[path] for path in split] for of in (leaves, over_data, columns))
        leaves |= zip(split, sums_in_shards(wholes, axes, "data", beside))
        for path in leaves:
            done = {SHARD_AXIS: bool(cuts[path]), "data": over_data[path] is not None}
            left = [axis for axis in summed if not done.get(axis)]
            leaves[path] = lax.psum(leaves[path], left) if left else leaves[path]
        return jax.tree.map(lambda x: lax.psum(x, summed), numbers), nested(leaves)

    # A kernel is only compiled where no axis is left to the compiler: axes of one device are not left to it.
    axes = {*summed, *(name for name, size in mesh.shape.items() if size == 1)}
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(specs, BATCH),
        out_specs=(PartitionSpec(), gradient_specs),
        axis_names=axes,
        # The gradient is that of a device's own sum; shard_map's check would sum it over devices at every use.
        check_vma=False,
    )


def over_tokens(mesh: Mesh, function: Callable) -> Callable:
    """function(params, batch) -> arrays [B, T], each device of the mesh axis "context" for its own tokens.

    On a mesh that cuts parameters, over "fsdp" or "tensor", all is left to the compiler, and every device of "context"
    computes whole rows: XLA aborts where a shard_map is over "context" and these axes are left to it (jaxlib 0.10.2).
    """
    if mesh.shape[CONTEXT_AXIS] == 1 or mesh.shape["fsdp"] * mesh.shape["tensor"] > 1:
        return function
    part = PartitionSpec(None, CONTEXT_AXIS)
    axes = {CONTEXT_AXIS, *(name for name, size in mesh.shape.items() if size == 1)}
    return jax.shard_map(
        function, mesh=mesh, in_specs=(PartitionSpec(), part), out_specs=part, axis_names=axes, check_vma=False
    )


def _of_rows(sharding: NamedSharding) -> PartitionSpec:
    """The part of an array's spec that shard_map is told: the axes that rows are split over."""
    return PartitionSpec(*(None if axes in (None, "tensor") else axes for axes in sharding.spec))


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)


def _dimension(spec: PartitionSpec, axis: str) -> int | None:
    """The dimension that is cut over a mesh axis."""
    return next((i for i, axes in enumerate(spec) if axes == axis or (type(axes) is tuple and axis in axes)), None)


def _cut(spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> int:
    """The dimension cut over SHARD_AXIS, counted from the last: −1, −2, ...; 0: none."""
    found = _dimension(spec, SHARD_AXIS)
    return 0 if found is None else found - leaf.ndim


def _columns(sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> int:
    """The dimension cut over "tensor", counted from the last; 0: none."""
    found = _dimension(sharding.spec, "tensor")
    return 0 if found is None else found - leaf.ndim


def _gathered_late(model: nnx.Module) -> set[str]:
    """The parts of a model whose layers gather their parameters themselves, one layer at a time."""
    ours = {"blocks"} if type(model).hidden is LanguageModel.hidden else set()
    plain = type(model.embedding) is Embedding and type(model).logits is LanguageModel.logits
    return ours | {"embedding"} if plain else ours


def _marked(
    parts: ModelParts, late: set[str], cuts: dict[tuple, int], columns: dict[tuple, int | None]
) -> nnx.GraphDef:
    """The model's graphdef with the metadata `cut` and `columns` at the parameters that layers gather themselves."""
    model = merge(parts, parts.params)
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        if cuts[path] and path[0] in late:
            parameter.set_metadata(cut=cuts[path], columns=columns[path])
    return nnx.split(model)[0]
