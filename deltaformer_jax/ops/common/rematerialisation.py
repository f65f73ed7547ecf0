"""A name for the operands of products and ops, which model.remat = "operands" keeps for the backward pass."""

from __future__ import annotations

from jax.ad_checkpoint import checkpoint_name

KEPT = "operand"


def kept(x):
    """x under the name KEPT, by which `jax.checkpoint_policies.save_only_these_names` finds it; else this is x."""
    return checkpoint_name(x, KEPT)
