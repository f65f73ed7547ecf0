"""The training step: one pure compiled function (state, batch) -> (state, metrics), which donates the old state."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from deltaformer_jax.config import OptimizerConfig
from deltaformer_jax.model_parts import ModelParts, joined
from deltaformer_jax.sharding.mesh import batch_sharding, on_mesh, replicated
from deltaformer_jax.training import guard
from deltaformer_jax.training.loss import (
    counted,
    logits_at_once,
    router_terms,
    routing_metrics,
    summed_nats,
    summed_nats_and_hits,
)
from deltaformer_jax.training.on_mesh.over_rows import over_rows
from deltaformer_jax.training.state import TrainState


def _here(parts: ModelParts, sums: Callable) -> Callable:
    """(params, batch) -> the sums over all rows, with what is sent between devices left to the compiler."""
    return functools.partial(sums, parts.graphdef)


def loss_and_gradient(
    parts: ModelParts,
    params,
    batch: dict[str, jax.Array],
    accumulation_steps: int,
    *,
    over: Callable = _here,
    **pieces: Any,
):
    """(loss, gradient, metrics): mean nats per counted token of the whole batch, the gradient of what is minimised.

    What is minimised is the loss and, in a model with experts, the losses of their routers; their metrics are those of
    `routing_metrics`, none without experts. The gradient is that of the trained parameters alone
    (`ModelParts.trained`); no other is computed.

    The batch is processed in `accumulation_steps` parts. Their sums of nats are added and divided once by the counted
    tokens of the whole batch, so the result is that of one large batch even if parts have different numbers of real
    tokens. `over`: `over_rows` of a mesh, so that each device sums over its own rows. `pieces`: arguments of
    `loss.batch_nats`: max_logits, how many logits a group of devices that shares rows may have at once; active.
    """

    def part_sum(graphdef, params, part):
        nats, routing = summed_nats(graphdef, params, part, **pieces)
        more, sums = router_terms(graphdef, params, routing, part)
        return nats + more, (nats, sums)

    sums = functools.partial(_sums, part_sum, accumulation_steps, parts)
    (_, (nats, of_routers)), gradient = over(parts, sums)(params, batch)
    share = _share(batch)
    return nats * share, jax.tree.map(lambda g: g * share, gradient), routing_metrics(of_routers, share)


def loss_gradient_and_accuracy(
    parts: ModelParts,
    params,
    batch: dict[str, jax.Array],
    accumulation_steps: int,
    *,
    over: Callable = _here,
    **pieces: Any,
):
    """(loss, gradient, metrics) as `loss_and_gradient`.

    metrics has accuracy too, the fraction of counted tokens whose target has the largest logit.
    """

    def part_sum(graphdef, params, part):
        nats, hits, routing = summed_nats_and_hits(graphdef, params, part, **pieces)
        more, sums = router_terms(graphdef, params, routing, part)
        return nats + more, (nats, hits, sums)

    sums = functools.partial(_sums, part_sum, accumulation_steps, parts)
    (_, (nats, hits, of_routers)), gradient = over(parts, sums)(params, batch)
    share = _share(batch)
    metrics = {"accuracy": hits.astype(jnp.float32) * share, **routing_metrics(of_routers, share)}
    return nats * share, jax.tree.map(lambda g: g * share, gradient), metrics


def _share(batch: dict[str, jax.Array]) -> jax.Array:
    """1 / the counted tokens of the batch."""
    return 1.0 / jnp.maximum(jnp.sum(counted(batch)), 1).astype(jnp.float32)


def _sums(
    part_sum: Callable, accumulation_steps: int, parts: ModelParts, graphdef, params, batch: dict[str, jax.Array]
):
    """((nats, beside), gradient), each summed over the parts of the batch; the gradient of the trained parameters.

    part_sum(graphdef, params, part) -> (nats, beside).
    """
    trained, frozen = parts.divided(params)

    def of_trained(trained, part):
        return part_sum(graphdef, joined(trained, frozen), part)

    part_gradient = jax.value_and_grad(of_trained, has_aux=True)
    if accumulation_steps == 1:
        return part_gradient(trained, batch)
    # Part a takes rows a, a + A, a + 2A, ...: each device divides its own rows, and none is sent to another device.
    cut = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, accumulation_steps, *x.shape[1:]), 0, 1),
        batch,
    )

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, part_gradient(trained, part)), None

    _, beside = jax.eval_shape(of_trained, trained, jax.tree.map(lambda x: x[0], cut))
    zero = (jnp.zeros((), jnp.float32), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), beside))
    return jax.lax.scan(add_part, (zero, jax.tree.map(jnp.zeros_like, trained)), cut)[0]


def mean_and_gradient(
    of_part: Callable,
    accumulation_steps: int,
    parts: ModelParts,
    params,
    rows: dict[str, Any],
    *,
    over: Callable = _here,
):
    """(mean over the real tokens of `rows`, its gradient), of of_part(graphdef, params, rows) = (sum, ()).

    rows: a dict of arrays [B, T, ...], segment_ids among them. The other arguments are as of `loss_and_gradient`.
    """
    sums = functools.partial(_sums, of_part, accumulation_steps, parts)
    (total, _), gradient = over(parts, sums)(params, rows)
    share = 1.0 / jnp.maximum(jnp.sum(rows["segment_ids"] > 0), 1).astype(jnp.float32)
    return total * share, jax.tree.map(lambda g: g * share, gradient)


class Beside(NamedTuple):
    """What a step minimises beside the mean nats of its rows of data.sequence_length.

    given: the shardings of what the step takes after the batch. added(gradient, state, batch, *given, over=) ->
    (the gradient of all of it, metrics), with the arguments of the step and `over` of `loss_and_gradient`.
    """

    given: tuple
    added: Callable


def _long(batch: dict[str, Any]) -> dict[str, jax.Array]:
    """The rows of data.sequence_length; other rows are dicts in the batch."""
    return {name: rows for name, rows in batch.items() if not isinstance(rows, dict)}


@contextlib.contextmanager
def _optax_promotes() -> Iterator[None]:
    """Optax's arithmetic relies on promotion of dtypes (0.9 ** step): a user's stricter settings are lifted for it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def make_train_step(
    optimiser: optax.GradientTransformation,
    schedule: optax.Schedule,
    settings: OptimizerConfig,
    parts: ModelParts,
    mesh: Mesh,
    shardings: TrainState,
    of_gradient: Any,
    *,
    sequence_parallel: bool = False,
    switches: Callable[[jax.Array], jax.Array] | None = None,
    beside: Beside | None = None,
) -> Callable:
    """jit of (state, batch) -> (state, metrics). The old state is donated. `of_gradient`: the gradient's shardings.
    `sequence_parallel`: as of `on_mesh`. `switches`: step -> the layers that it trains, bool [num_layers]; None: all.
    `beside`: what is minimised beside the nats of these rows; the step then also takes what `beside.given` describes.

    batch: tokens, targets, segment_ids, int32 [batch_size, T]; for a task or conversations also loss_mask, bool.
    With `beside`, also a dict of arrays for each kind of rows beside these.
    metrics, float32 []: loss and, with a loss_mask, accuracy, both before the update; grad_norm, before clipping;
    learning_rate, of this update; skipped, 1 if guard.py skips the update, else 0; with `switches` depth, the number of
    layers that were trained; with layers of experts those of `routing_metrics`. They stay on the device until read.
    """

    over = functools.partial(over_rows, mesh, of_gradient)

    def step(state: TrainState, batch: dict[str, Any], *given: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        arguments = (parts, state.params, _long(batch), settings.accumulation_steps)
        pieces = {"over": over, "max_logits": logits_at_once(mesh)}
        more = {}
        if switches is not None:
            pieces["active"] = switches(state.step)
            more["depth"] = jnp.sum(pieces["active"], dtype=jnp.float32)
        if "loss_mask" in batch:
            loss, gradient, found = loss_gradient_and_accuracy(*arguments, **pieces)
        else:
            loss, gradient, found = loss_and_gradient(*arguments, **pieces)
        more |= found
        if beside is not None:
            gradient, terms = beside.added(gradient, state, batch, *given, over=over)
            more |= terms
        norm = optax.tree.norm(gradient)
        ok = guard.good(state.guard, loss, norm, settings)
        trained, frozen = parts.divided(state.params)
        with _optax_promotes():
            updates, opt_state = optimiser.update(gradient, state.opt_state, trained)
            rate = jnp.asarray(schedule(state.guard.made), jnp.float32)
        keep = lambda new, old: jax.tree.map(lambda new, old: jnp.where(ok, new, old), new, old)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            # The schedule counts updates, as the optimiser does.
            "learning_rate": rate,
            "skipped": 1.0 - ok.astype(jnp.float32),
            **more,
        }
        new = TrainState(
            joined(keep(optax.apply_updates(trained, updates), trained), frozen),
            keep(opt_state, state.opt_state),
            state.step + 1,
            guard.after(state.guard, ok, norm),
        )
        return new, metrics

    return jax.jit(
        on_mesh(mesh, step, sequence_parallel=sequence_parallel),
        in_shardings=(shardings, batch_sharding(mesh), *(() if beside is None else beside.given)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
