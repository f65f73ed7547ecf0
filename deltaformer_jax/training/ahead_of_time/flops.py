"""The arithmetic of a training step, in closed form.

XLA's own count is of no use for that: it takes the body of a loop once, and does not see into kernels.
"""

from __future__ import annotations

from typing import NamedTuple

from deltaformer_jax.model_parts import ModelParts, flat, merge


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

    The ops' are what the feed-forward layers, the products with the mixers' kernels and the logits leave.
    """
    model = merge(parts, parts.params)
    axes = dict(flat(parts.axes["blocks"]))
    sizes = {path: leaf.size for path, leaf in flat(parts.params["blocks"]) if path[1] == "mixer"}
    kernels = sum(2.0 * size for path, size in sizes.items() if len(axes[path]) > 1)
    feeds = sum(model.periods * block.mlp.flops_per_token(length) for block in model.blocks)
    whole, head = model.flops_per_token(length), model.embedding.flops_per_token(length)
    return Flops(whole, whole - kernels - feeds - head, head)
