"""Parameters that an axis of the mesh cannot split evenly: said once by name, or refused with mesh.strict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from deltaformer_jax.model_parts import ModelParts
from deltaformer_jax.sharding.mesh import kept_whole

_NAMED = 3  # parameters


def check_split(parts: ModelParts, mesh: Mesh, strict: bool, note: Callable[[str], Any]) -> None:
    """`note` a line for each size that an axis does not divide; with `strict` raise them as a ValueError.

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
    if lines and strict:
        raise ValueError(f"{'; '.join(lines)}; choose sizes that divide, or set mesh.strict=False")
    for line in lines:
        note(line)


def _line(name: str, size: int, axis: str, mesh: Mesh, parameters: list[str]) -> str:
    listed = ", ".join(parameters[:_NAMED])
    more = f" and {len(parameters) - _NAMED} more" if len(parameters) > _NAMED else ""
    return f"mesh.{axis} = {mesh.shape[axis]} does not divide {name} = {size}: every device holds all of {listed}{more}"
