"""Long and short rows together: with a and b the first two numbers of objective.cycle,

    L = (a CE(rows of data.sequence_length) + b CE(rows of short_length)) / (a + b)

CE: the mean nats of a counted token. The rows of both lengths have tokens as a to b, so that L is about the mean over
all tokens of the step.
"""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from deltaformer_jax.config import Config
from deltaformer_jax.model_parts import ModelParts
from deltaformer_jax.training.loss import logits_at_once
from deltaformer_jax.training.objectives.rows import SHORT
from deltaformer_jax.training.step import Beside, loss_and_gradient


def mixing(config: Config, parts: ModelParts, mesh: Mesh) -> Beside:
    """The short rows' part for a step. Metrics: short_loss, before the update."""
    long, short, _ = config.objective.shares()

    def added(gradient, state, batch, *, over):
        loss, of_short, _ = loss_and_gradient(
            parts,
            state.params,
            batch[SHORT],
            config.optimizer.accumulation_steps,
            over=over,
            max_logits=logits_at_once(mesh),
        )
        mean = lambda a, b: (long * a + short * b) / (long + short)
        return jax.tree.map(mean, gradient, of_short), {"short_loss": loss}

    return Beside((), added)
