"""Elastic depth: some steps train a model that leaves out layers, so that they can be removed after training.

At step s, with p = objective.depth_probability and the depths d_1, ..., d_n of objective.depths:

    all layers with probability 1 − p,        the layers of d_i with probability p / n each

The draw is a function of (run.seed, s), so that a resumed run makes the same draws. A layer that is left out gets the
gradient 0; the optimiser's moments and weight decay go on. Every step costs as much as one of all layers: one compiled
program serves all depths.

Source: the training of ERNIE 5.0 on sub-models of several depths, of which only the abstract was read; which layers are
left out, and how often, is this library's choice.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax.config import ObjectiveConfig

# Sets these draws apart from others that are made from the same seed.
_DRAWS = 0x0DE9


def layer_switches(objective: ObjectiveConfig, num_layers: int, seed: int) -> Callable[[jax.Array], jax.Array] | None:
    """step int [] -> bool [num_layers], True for the layers that the step trains; None if all steps train all layers.

    Raises ValueError, naming the field, for depths or layers that the model does not have.
    """
    if objective.name != "elastic":
        return None
    masks = np.ones((1 + len(left_out := objective.left_out(num_layers)), num_layers), bool)
    for mask, layers in zip(masks[1:], left_out):
        mask[list(layers)] = False

    def switches(step: jax.Array) -> jax.Array:
        whether, which = jax.random.split(jax.random.fold_in(jax.random.key(seed ^ _DRAWS), step))
        chosen = jax.random.randint(which, (), 1, len(masks))
        smaller = jax.random.uniform(whether) < objective.depth_probability
        return jnp.asarray(masks)[jnp.where(smaller, chosen, 0)]

    return switches
