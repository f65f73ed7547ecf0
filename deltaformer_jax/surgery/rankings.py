"""The order in which layers can be spared, from the least to the most important, by five rules.

bi                  ascending Block Influence
relative_magnitude  ascending relative magnitude
loss                ascending loss of the model without that layer alone
reverse             from the last layer to the first
sequential          from the first layer to the last

Source: Men et al., "ShortGPT", arXiv 2403.03853, sections 3.3 and 4.1.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaformer_jax.model import LanguageModel
from deltaformer_jax.surgery.influence import block_influence
from deltaformer_jax.training.loss import batch_nats, counted

MEASURED = ("bi", "relative_magnitude", "loss")
RANKINGS = (*MEASURED, "reverse", "sequential")


def ranking(values: dict[str, np.ndarray], name: str, num_layers: int) -> list[int]:
    """The layers' numbers by the rule `name`. values: of the rules of MEASURED, [num_layers] each.

    Raises ValueError, naming `name`, unless it is one of RANKINGS.
    """
    if name not in RANKINGS:
        raise ValueError(f"name={name!r}: give one of {', '.join(RANKINGS)}")
    if name in MEASURED:
        return [int(layer) for layer in np.argsort(values[name], kind="stable")]
    return list(range(num_layers))[:: -1 if name == "reverse" else 1]


def measure(model: LanguageModel, batches: Iterable[dict], names: Iterable[str] = MEASURED) -> dict[str, np.ndarray]:
    """{name: [num_layers]} for the rules `names` of MEASURED, over batches as `data.batches` gives them.

    Cost: a forward pass for Block Influence and relative magnitude, num_layers more for losses.
    """
    batches, layers = list(batches), model.periods * len(model.blocks)
    found = block_influence(model, batches) if {"bi", "relative_magnitude"} & set(names) else {}
    if "loss" in names:
        found["loss"] = losses(model, batches, ~np.eye(layers, dtype=bool))
    return {name: found[name] for name in names}


def losses(model: LanguageModel, batches: Iterable[dict], active: np.ndarray) -> np.ndarray:
    """The mean nats of a counted token with the layers of each row of `active`, bool [N, num_layers] -> float64 [N].

    All rows share one compiled program. Cost: N forward passes. Memory: see `training.loss.over_logits`. Raises
    ValueError if no token is counted.
    """
    sums, count = np.zeros(len(active)), 0
    for batch in batches:
        batch = {name: jnp.asarray(x) for name, x in batch.items()}
        sums += [float(_nats(model, batch, jnp.asarray(row))) for row in active]
        count += int(jnp.sum(counted(batch)))
    if count == 0:
        raise ValueError("batches: they hold no token whose loss is counted")
    return sums / count


@jax.jit
def _nats(model: LanguageModel, batch: dict[str, jax.Array], active: jax.Array) -> jax.Array:
    return jnp.sum(batch_nats(*nnx.split(model), batch, active=active))
