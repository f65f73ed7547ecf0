"""Chooses which launches compute the gated ops (gated/table.py of the Triton kernels)."""

from __future__ import annotations

import contextlib

import jax

from pallas_kernels.triton.gated.table import CHOSEN_PLANS, has_plan
from pallas_kernels.triton.limits import WIDTHS


def use_plan(plan: str) -> None:
    """Follow this plan in this process, where it has tiles."""
    for entry in CHOSEN_PLANS:
        CHOSEN_PLANS[entry] = tuple(plan if has_plan(plan, width, True) else "stages" for width in WIDTHS)
    jax.clear_caches()  # what was traced for these shapes knows the plan


@contextlib.contextmanager
def planned(plan: str):
    """Follow this plan inside."""
    before = dict(CHOSEN_PLANS)
    use_plan(plan)
    try:
        yield
    finally:
        CHOSEN_PLANS.update(before)
        jax.clear_caches()
