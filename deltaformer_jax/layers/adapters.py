"""LoRA: a model whose kernels are left as they are, each with a trained change of low rank beside it, and back.

    x W  ->  x W + (x A) B * alpha / rank

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deltaformer_jax.layers.linear import AdaptedKernel, Adapter, input_axes, truncated_normal


def adapt(model: nnx.Module, rank: int, alpha: float, patterns: tuple[str, ...], *, rngs: nnx.Rngs) -> nnx.Module:
    """The model with an AdaptedKernel in the place of each matrix in `model.blocks` whose name matches a pattern.

    A name is the path within a block, such as "mixer.inputs.query"; in a pattern * stands for anything. Which kernels
    are matrices says `linear.input_axes`. A is drawn with variance 1 / fan-in and B is 0, so that the outputs are the
    model's. A and B carry the names of the axes that they share with W, and are sharded like these.

    Raises ValueError, naming optimizer.lora_kernels or optimizer.lora_rank, for a pattern that matches nothing and a
    rank above the smaller side of a matched kernel.
    """
    names: set[str] = set()
    matched: set[str] = set()

    def adapted(path: tuple, part: Any) -> Any:
        if not isinstance(part, nnx.Param) or getattr(path[0], "name", "") != "blocks":
            return part
        axes = tuple(part.get_metadata("axes", ()))
        inputs, name = input_axes(axes), ".".join(_key(key) for key in path[2:])
        if inputs is None:
            return part
        names.add(name)
        found = {pattern for pattern in patterns if fnmatchcase(name, pattern)}
        matched.update(found)
        return _adapted(name, part, axes, inputs, rank, alpha, rngs) if found else part

    made = jax.tree_util.tree_map_with_path(adapted, model, is_leaf=lambda part: isinstance(part, nnx.Variable))
    if unmatched := [pattern for pattern in patterns if pattern not in matched]:
        raise ValueError(
            f"optimizer.lora_kernels: {unmatched[0]!r} matches no kernel of the model; its kernels are "
            f"{', '.join(sorted(names))}"
        )
    return made


def _adapted(
    name: str, kernel: nnx.Param, axes: tuple, inputs: int, rank: int, alpha: float, rngs: nnx.Rngs
) -> AdaptedKernel:
    stacked = kernel.ndim - len(axes)
    layers, wide, out = kernel.shape[:stacked], kernel.shape[stacked:][:inputs], kernel.shape[stacked:][inputs:]
    smaller = min(math.prod(wide), math.prod(out))
    if rank > smaller:
        raise ValueError(
            f"optimizer.lora_rank = {rank}: above {smaller}, the smaller side of the kernel {name}, "
            f"{math.prod(wide)} x {math.prod(out)}; give a smaller rank, or leave that kernel out of "
            "optimizer.lora_kernels"
        )
    compute = kernel.get_metadata("compute", False)
    drawn = truncated_normal(rngs, (*layers, *wide, rank), 1 / math.sqrt(math.prod(wide)))
    down = Adapter(drawn, axes=(*axes[:inputs], "rank"), compute=compute)
    up = Adapter(jnp.zeros((*layers, rank, *out), jnp.float32), axes=("rank", *axes[inputs:]), compute=compute)
    return AdaptedKernel(kernel, down, up, alpha / rank)


def merged(model: nnx.Module) -> nnx.Module:
    """The model with W + A B * alpha / rank, in W's dtype, in the place of each AdaptedKernel. Others as they are."""
    is_adapted = lambda part: isinstance(part, AdaptedKernel)
    add = lambda part: part.kernel.replace(part.merged()) if is_adapted(part) else part
    return jax.tree.map(add, model, is_leaf=is_adapted)


def _key(key: Any) -> str:
    return str(getattr(key, "name", getattr(key, "idx", key)))
