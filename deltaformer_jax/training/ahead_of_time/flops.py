"""The arithmetic of a training step, in closed form.

XLA's own count is of no use for that: it takes the body of a loop once, and does not see into kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax

from deltaformer_jax.model_parts import ModelParts, merge


class Flops(NamedTuple):
    """FLOPs per token, a multiply-add counts 2. All are forward: the backward pass takes twice as many.

    model: everything. ops: the mixers' ops. head: the logits.
    """

    model: float
    ops: float
    head: float

    def recomputed(self, remat: str) -> float:
        """What the backward pass computes again under `model.remat`."""
        layers = self.model - self.head
        return {"none": 0.0, "operands": 0.0, "products": 0.0, "kernels": layers - self.ops, "block": layers}[remat]


def model_flops(parts: ModelParts, length: int) -> Flops:
    """The model's FLOPs per token at documents of `length` tokens.

    The ops' are what the products with the layers' kernels and the logits leave.
    """
    model = merge(parts, parts.params)
    axes = jax.tree.leaves(parts.axes["blocks"], is_leaf=lambda x: isinstance(x, tuple))
    kernels = sum(
        2.0 * leaf.size
        for leaf, names in zip(jax.tree.leaves(parts.params["blocks"]), axes, strict=True)
        if len(names) > 1
    )
    whole, head = model.flops_per_token(length), model.embedding.flops_per_token(length)
    return Flops(whole, whole - kernels - head, head)
