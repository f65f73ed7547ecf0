"""Parameters that an axis of the mesh cannot split evenly: said once by name, or refused with mesh.strict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from deltaformer_jax.model_parts import ModelParts, flat
from deltaformer_jax.sharding.mesh import also_over_data, kept_whole
from deltaformer_jax.training.state import parameter_shardings

_NAMED = 3  # parameters


def check_split(
    parts: ModelParts, mesh: Mesh, strict: bool, note: Callable[[str], Any], *, zero1: bool = False
) -> None:
    """`note` a line for each size that an axis does not divide; with `strict` raise them as a ValueError.

    With `zero1` also one for the matrices of which "data" cannot split what the optimiser keeps.

    The ops follow the parameters: heads that "tensor" does not divide are computed on every device along it, except
    that devices share key heads (`sharding/over_devices.py`).
    """
    found: dict[tuple[str, int, str], list[str]] = {}
    axes = jax.tree.leaves(parts.axes, is_leaf=lambda node: isinstance(node, tuple))
    for (path, leaf), named in zip(jax.tree_util.tree_leaves_with_path(parts.params), axes, strict=True):
        for dimension in kept_whole(named, leaf.shape, mesh):
            names = found.setdefault(dimension, [])
            names.append(".".join(str(getattr(key, "key", key)) for key in path))
    lines = [_line(*dimension, mesh, names) for dimension, names in found.items()]
    if zero1 and mesh.shape["data"] > 1 and (names := _whole_over_data(parts, mesh)):
        lines.append(
            f"mesh.data = {mesh.shape['data']} divides no size of {_listed(names)}, as mesh.zero1 needs: every device "
            "along data keeps all of their optimiser's state"
        )
    if lines and strict:
        raise ValueError(f"{'; '.join(lines)}; choose sizes that divide, or set mesh.strict=False")
    for line in lines:
        note(line)


def _whole_over_data(parts: ModelParts, mesh: Mesh) -> list[str]:
    """The matrices that are trained and that `also_over_data` leaves as they are."""
    shapes, axes, shardings = (
        dict(flat(parts.divided(tree)[0])) for tree in (parts.params, parts.axes, parameter_shardings(parts, mesh))
    )
    whole = {path: also_over_data(sharding, shapes[path].shape) == sharding for path, sharding in shardings.items()}
    return [".".join(map(str, path)) for path, is_whole in whole.items() if is_whole and len(axes[path]) > 1]


def _line(name: str, size: int, axis: str, mesh: Mesh, parameters: list[str]) -> str:
    held = _listed(parameters)
    return f"mesh.{axis} = {mesh.shape[axis]} does not divide {name} = {size}: every device holds all of {held}"


def _listed(parameters: list[str]) -> str:
    more = f" and {len(parameters) - _NAMED} more" if len(parameters) > _NAMED else ""
    return ", ".join(parameters[:_NAMED]) + more
