"""bits per byte = total nats of the targets / ln 2 / their total bytes, over a whole split, not a mean of batches.

Of conversations the targets are the tokens of answers. A special token, such as the one that ends an answer, stands for
no bytes of the text, but its nats count: where a text ends has to be said too. So it is with end-of-text after a
document.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from deltaformer_jax.model_parts import ModelParts
from deltaformer_jax.processes import common
from deltaformer_jax.sharding.mesh import on_mesh, replicated
from deltaformer_jax.sharding.rows import LocalRows, to_devices
from deltaformer_jax.training.loss import batch_nats, batch_nats_and_hits
from deltaformer_jax.training.on_mesh.over_rows import over_tokens


class Evaluation(NamedTuple):
    """loss: nats per token. bits_per_byte: None for a task. tokens: number of targets. bytes: their length as text.

    accuracy: for a task or conversations, the fraction of targets that have the largest logit.
    """

    loss: float
    bits_per_byte: float | None
    tokens: int
    bytes: int
    accuracy: float | None = None


def make_evaluation_step(parts: ModelParts, mesh: Mesh) -> Callable:
    """jit of (params, batch) -> {"nats": float32 [B]}, the sum over each row.

    For a task or conversations also {"hits": int32 [B]}: how many targets have the largest logit.
    Results are replicated to every host.
    """

    def step(params, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if "loss_mask" not in batch:
            return {"nats": jnp.sum(over_tokens(mesh, parts, batch_nats)(params, batch), axis=1)}
        nats, hits = over_tokens(mesh, parts, batch_nats_and_hits)(params, batch)
        return {"nats": jnp.sum(nats, axis=1), "hits": jnp.sum(hits, axis=1, dtype=jnp.int32)}

    return jax.jit(on_mesh(mesh, step), out_shardings=replicated(mesh))


def bits_per_byte(nats: float, size: int) -> float | None:
    """nats / ln 2 / size, the bits of targets of `size` bytes; None if they have none, as those of a task."""
    return nats / math.log(2) / size if size else None


def evaluate(
    evaluation_step: Callable,
    params,
    batches: Iterable[dict[str, np.ndarray]],
    *,
    token_bytes: np.ndarray,
    sharding: NamedSharding,
    rows: LocalRows | None = None,
    limit: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """The loss over the batches: the first `limit`, or all for 0. Each host reads its own `rows` (`sharding.rows`).

    token_bytes: int32 [vocab], the number of bytes of each token. It is 0 for the document separator and other special
    tokens, whose nats still count. Row sums are added in float64 in the order of the batches, so the result is the same
    number every time.
    Returns None if `stop()` became true. Raises ValueError if there is no target, or none that stands for text.
    """
    sums: dict[str, float] = {}
    counts, waiting = np.zeros(2, np.int64), None
    for batch in itertools.islice(batches, limit or None):
        if stop():
            return None
        asked = has_target(batch)
        if rows is not None:
            asked &= rows.own[:, None]
        counts += (asked.sum(), token_bytes[batch["targets"][asked]].sum())
        of_rows = evaluation_step(params, to_devices(batch, sharding, rows))
        if waiting is not None:  # read one batch late, so that the devices are never idle
            _add(sums, waiting)
        waiting = of_rows
    if waiting is not None:
        _add(sums, waiting)
    # Not on the devices, where 64-bit integers would become 32-bit ones.
    tokens, size = (sum(part) for part in zip(*common.gather("evaluation counts", counts.tolist())))
    nats = sums.get("nats", 0.0)
    if tokens == 0:
        raise ValueError("data: the evaluation split has no target; give it more documents, or longer rows")
    if size == 0 and "hits" not in sums:
        raise ValueError("data: the evaluation split holds no text; prepare a corpus with more documents")
    accuracy = sums["hits"] / tokens if "hits" in sums else None
    return Evaluation(nats / tokens, bits_per_byte(nats, size), tokens, size, accuracy)


def has_target(batch: dict[str, np.ndarray]) -> np.ndarray:
    """bool [B, T] on the host: the tokens whose loss counts, as `loss.counted` on the devices."""
    real = batch["segment_ids"] > 0
    return real & batch["loss_mask"] if "loss_mask" in batch else real


def _add(sums: dict[str, float], of_rows: dict[str, jax.Array]) -> None:
    for name, values in of_rows.items():
        sums[name] = sums.get(name, 0.0) + float(np.sum(np.asarray(values), dtype=np.float64))
