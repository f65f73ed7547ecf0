"""Sums over a batch and their gradient, each device for its own part: what is sent between devices is written here.

With devices along the mesh axes "data", "fsdp" and "expert", which split rows, and "context", which splits their
tokens, and S_d the sum over the part of device d,

    S = Σ_d S_d,        dS/dW = Σ_d dS_d/dW

Over "fsdp" a parameter's gradient is reduce-scattered where the layers use it (`sharding/shards.py`). Over "data" and
"context", and over "fsdp" for a parameter that is not cut, it is summed once, when all parts of the batch have been
added up; over "expert" too, but for the experts' own kernels, which each device has for the tokens of all. The mesh
axis "tensor" is left to the compiler and to the ops. S_d depends on the tokens of earlier devices of
"context": their part of dS_d/dW is computed where they are, by the transposes of the ops' collectives.
"""

from __future__ import annotations

import functools
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
from deltaformer_jax.sharding.mesh import BATCH
from deltaformer_jax.sharding.shards import SHARD_AXIS, all_shards, sums_in_shards
from deltaformer_jax.training.state import parameter_shardings

Sums = Callable[[nnx.GraphDef, Any, dict[str, jax.Array]], tuple[Any, Any]]


def over_rows(mesh: Mesh, of_gradient: Any, parts: ModelParts, sums: Sums) -> Callable:
    """(params, batch) -> sums(graphdef, params, batch) = (numbers, gradient), summed over all rows of the batch.

    sums: called for a device's own rows, with the model's graphdef. Its numbers are a pytree of scalars, its gradient
    that of the trained parameters. `of_gradient`: the gradient's NamedShardings, which may be cut over "data" too: it
    is then reduce-scattered over that axis.
    """
    summed = axes_of_tokens(mesh)
    if not summed:
        return functools.partial(sums, parts.graphdef)
    own = _Own(mesh, parts)
    gradient_specs = jax.tree.map(_of_rows, of_gradient)
    over_data = {path: _dimension(spec, "data") for path, spec in flat(gradient_specs)}

    def local(params, batch):
        trained, frozen = parts.divided(params)
        whole, pull = jax.vjp(own.gathered_early, trained)
        numbers, gradient = sums(own.graphdef, joined(whole, own.gathered_early(frozen)), batch)
        (gradient,) = pull(gradient)
        leaves = dict(flat(gradient))
        split = [path for path, axis in over_data.items() if axis is not None]
        wholes, axes, beside = ([of[path] for path in split] for of in (leaves, over_data, own.columns))
        leaves |= zip(split, sums_in_shards(wholes, axes, "data", beside))
        for path in leaves:
            done = {
                SHARD_AXIS: bool(own.cuts[path]),
                "data": over_data[path] is not None,
                "expert": _dimension(own.spec_of[path], "expert") is not None,
            }
            left = [axis for axis in summed if not done.get(axis)]
            leaves[path] = lax.psum(leaves[path], left) if left else leaves[path]
        return jax.tree.map(lambda x: lax.psum(x, summed), numbers), nested(leaves)

    return own.mapped(local, (PartitionSpec(), gradient_specs))


def over_tokens(mesh: Mesh, parts: ModelParts, function: Callable, out: PartitionSpec = BATCH) -> Callable:
    """(params, batch) -> function(graphdef, params, batch), each device for its own rows and tokens. No gradient.

    function: returns a pytree of arrays, [B, T] of a device's own tokens by default; with out = PartitionSpec() arrays
    that it has made equal on all devices along `axes_of_tokens`.
    """
    if not axes_of_tokens(mesh):
        return functools.partial(function, parts.graphdef)
    own = _Own(mesh, parts)
    return own.mapped(lambda params, batch: function(own.graphdef, own.gathered_early(params), batch), out)


def axes_of_tokens(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that split a batch, its rows or their tokens, and have several devices."""
    return tuple(axis for axis in (*ROW_AXES, CONTEXT_AXIS) if mesh.shape[axis] > 1)


class _Own:
    """A model's parameters as each device has them in a shard_map over the axes that split a batch.

    graphdef: the model's, whose layers gather their parameters themselves where they can. cuts, columns: path -> the
    dimensions cut over "fsdp" and "tensor", counted from the last one: −1, −2, ...; 0 and None: none.
    """

    def __init__(self, mesh: Mesh, parts: ModelParts):
        shardings = parameter_shardings(parts, mesh)
        self._mesh = mesh
        self._specs = jax.tree.map(_of_rows, shardings)
        self._late = _gathered_late(merge(parts, parts.params))
        self.spec_of = dict(flat(self._specs))
        self.cuts = dict(flat(jax.tree.map(_cut, self._specs, parts.params, is_leaf=_is_spec)))
        self.columns = {path: column or None for path, column in flat(jax.tree.map(_columns, shardings, parts.params))}
        self.graphdef = _marked(parts, self._late, self.cuts, self.columns)

    def gathered_early(self, params: Any) -> Any:
        """`params`, or a part of them, with the whole arrays of those that no layer gathers by itself."""
        leaves = dict(flat(params))
        early = [path for path in leaves if self.cuts[path] and path[0] not in self._late]
        if early:
            leaves |= zip(
                early, all_shards(*([of[path] for path in early] for of in (leaves, self.cuts, self.columns)))
            )
        return nested(leaves)

    def mapped(self, local: Callable, out: Any) -> Callable:
        # XLA aborts where a mesh that cuts parameters is left to it and "context" is not (jaxlib 0.10.2), so that the
        # map is over all axes that split a batch. A kernel is only compiled where no axis is left to the compiler: axes
        # of one device are not left to it.
        return jax.shard_map(
            local,
            mesh=self._mesh,
            in_specs=(self._specs, BATCH),
            out_specs=out,
            axis_names={*self._mesh.axis_names} - ({"tensor"} if self._mesh.shape["tensor"] > 1 else set()),
            # The gradient is that of a device's own sum; shard_map's check would sum it over devices at every use.
            check_vma=False,
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
