"""How many facts a feed-forward layer stores: recall by the number of facts F, the width N and the kernel.

A fact is a key x_i and one of M values. The layer y(x) of width N is trained on all F facts at once, with the
cross-entropy of the logits y(x_i)·e_m, e_m the values' vectors. A fact is recalled if its own value has the largest.

    units a fact = (Σ_j c_j)² / Σ_j c_j²,  c_j = |h_j(x_i)| ‖v_j‖,  y(x) = Σ_j h_j(x) v_j, the mean over facts
                   that any unit answers

is 1 if a single hidden unit answers (precision: a unit for a fact) and N if all answer alike. With more facts than
units each unit must serve several facts (polysemanticity). All kernels have about the same number of parameters: a
layer with two kernels into its units has two thirds of the width.

The width is swept apart, at F = 32 N facts, more than any kernel holds: what counts there is recall times F, the facts
that are stored.

Keys and e_m are standard normal, of width d; e_m is divided by √d. Source: the view is that of Zhong et al., arXiv
2505.19488, who measure nothing like this; the experiment is this library's.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deltaformer_jax.layers.feed_forward import FEED_FORWARDS
from deltaformer_jax.layers.feed_forward.sizes import GATED
from deltaformer_jax.plot.style import explain, line_styles, plain, reference
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure, values_of

FULL = dict(
    width=32,
    units=64,
    values=64,
    facts=(16, 64, 128, 256, 512, 1024, 2048, 4096),
    steps=2000,
    seeds=(0, 1),
    other_units=(16, 32, 128),
)
QUICK = dict(width=32, units=64, values=64, facts=(64, 1024), steps=300, seeds=(0,))
OVERLOAD = 32  # facts a unit where the width is swept
RATE = 3e-3  # Adam's, falling to 0 along a cosine
PIECE = 100  # steps between two looks at `stop`
# Label -> (a name of `model.feed_forward`, the similarity of a memory).
KERNELS = {
    "relu": ("relu", None),
    "relu²": ("relu2", None),
    "gelu": ("gelu", None),
    "SwiGLU": ("swiglu", None),
    "GeGLU": ("geglu", None),
    "softmax memory": ("memory", "softmax"),
    "exp memory": ("memory", "exp"),
    "linear memory": ("memory", "linear"),
}


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    same = {name: sizes[name] for name in ("width", "units", "values", "steps")}
    return [
        {"label": f"{kernel}, F = {facts}, seed {seed}", "kernel": kernel, "facts": facts, **same, "seed": seed}
        for kernel in KERNELS
        for facts in sizes["facts"]
        for seed in sizes["seeds"]
    ] + [
        {
            "label": f"{kernel}, N = {units}, F = {OVERLOAD * units}",
            "kernel": kernel,
            "facts": OVERLOAD * units,
            **(same | {"units": units}),
            "seed": 0,
            "sweep": "width",
        }
        for kernel in KERNELS
        for units in sizes.get("other_units", ())
    ]


def layer_of(settings: dict[str, Any]) -> nnx.Module:
    """The feed-forward layer of a cell, with about 2 d N parameters."""
    name, similarity = KERNELS[settings["kernel"]]
    units = round(2 * settings["units"] / 3) if name in GATED else settings["units"]
    more = {"feed_forward_similarity": similarity} if similarity else {}
    return FEED_FORWARDS[name](settings["width"], units, rngs=nnx.Rngs(settings["seed"]), **more)


def hidden_units(layer: nnx.Module, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(h [F,N], v [N,d]) with y(x) = h v: a layer whose values are the unit vectors returns its hidden units."""
    graph, parameters = nnx.split(layer)
    last = "values" if "values" in parameters else "down"
    numbers = parameters[last][...]
    parameters[last] = parameters[last].replace(jnp.eye(len(numbers), dtype=numbers.dtype))
    return nnx.merge(graph, parameters)(x[None])[0], numbers


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    del folder, note
    width, facts, values = (settings[name] for name in ("width", "facts", "values"))
    for_keys, for_values, for_facts = jax.random.split(jax.random.key(settings["seed"]), 3)
    keys = jax.random.normal(for_keys, (facts, width))
    answers = jax.random.normal(for_values, (values, width)) / width**0.5
    # Every value answers as many facts as any other, or one more.
    right = jax.random.permutation(for_facts, jnp.arange(facts) % values)
    graph, parameters = nnx.split(layer_of(settings))
    count = sum(leaf.size for leaf in jax.tree.leaves(parameters))
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, settings["steps"]))

    def logits_of(parameters):
        return nnx.merge(graph, parameters)(keys[None])[0] @ answers.T

    def loss(parameters):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_of(parameters), right))

    @jax.jit
    def piece(carry):
        def step(carry, _):
            parameters, state = carry
            nats, gradient = jax.value_and_grad(loss)(parameters)
            change, state = optimizer.update(gradient, state)
            return (optax.apply_updates(parameters, change), state), nats

        return jax.lax.scan(step, carry, length=min(PIECE, settings["steps"]))

    @jax.jit
    def measure(parameters):
        recalled = jnp.mean(jnp.argmax(logits_of(parameters), axis=-1) == right)
        hidden, vectors = hidden_units(nnx.merge(graph, parameters), keys)
        parts = jnp.abs(hidden) * jnp.linalg.norm(vectors, axis=-1)
        squares, answered = jnp.sum(parts**2, axis=-1), jnp.any(parts > 0, axis=-1)
        units = jnp.where(answered, jnp.sum(parts, axis=-1) ** 2 / jnp.where(answered, squares, 1.0), 0.0)
        return recalled, jnp.sum(units) / jnp.sum(answered)

    carry = parameters, optimizer.init(parameters)
    for _ in range(-(-settings["steps"] // PIECE)):
        if stop.requested:
            return None
        carry, nats = piece(carry)
    recalled, units = measure(carry[0])
    return {
        "recall": float(recalled),
        "nats": float(nats[-1]),
        "units_a_fact": float(units),
        "parameters": count,
    }


def _of_sweep(done: list[dict[str, Any]], sweep: str) -> list[dict[str, Any]]:
    return [record for record in done if record["settings"].get("sweep", "facts") == sweep]


def stored(done: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Kernel -> width N -> recall · F at F = 32 N, the mean over seeds."""
    found: dict[str, dict[int, list[float]]] = {}
    for record in done:
        settings = record["settings"]
        if settings["facts"] == OVERLOAD * settings["units"]:
            of_kernel = found.setdefault(settings["kernel"], {}).setdefault(settings["units"], [])
            of_kernel.append(record["result"]["recall"] * settings["facts"])
    return {name: {n: float(np.mean(of[n])) for n in sorted(of)} for name, of in found.items()}


def _means(done: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """(kernel, facts) -> the results of its seeds, where the number of facts is swept."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in _of_sweep(done, "facts"):
        found.setdefault((record["settings"]["kernel"], record["settings"]["facts"]), []).append(record["result"])
    return {
        where: {
            name: np.array([result[name] for result in results]) for name in ("recall", "units_a_fact", "parameters")
        }
        for where, results in found.items()
    }


def _recall(found: dict[tuple[str, int], dict[str, np.ndarray]], kernel: str, facts: int) -> float:
    return found[kernel, facts]["recall"].mean() if (kernel, facts) in found else 0.0


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    units = values_of(_of_sweep(done, "facts"), "units")
    wide = [
        {
            "kernel": record["settings"]["kernel"],
            "units N": record["settings"]["units"],
            "facts F": record["settings"]["facts"],
            "F / N": OVERLOAD,
            "recall": f"{record['result']['recall']:.3f}",
            "units a fact": f"{record['result']['units_a_fact']:.1f}",
            "parameters": record["result"]["parameters"],
        }
        for record in _of_sweep(done, "width")
    ]
    return [
        {
            "kernel": kernel,
            "units N": units[0],
            "facts F": facts,
            "F / N": f"{facts / units[0]:g}",
            "recall": f"{results['recall'].mean():.3f} ± {results['recall'].std():.3f}",
            "units a fact": f"{results['units_a_fact'].mean():.1f}",
            "parameters": int(results["parameters"][0]),
        }
        for (kernel, facts), results in _means(done).items()
    ] + wide


def figure(done: list[dict[str, Any]]):
    picture = new_figure(16, 5.6)
    panels = picture.subplots(1, 3)
    swept = _of_sweep(done, "facts") or done
    settings, found = swept[0]["settings"], _means(done)
    kernels, counts = values_of(done, "kernel"), values_of(swept, "facts")
    styles = line_styles(kernels)
    for axes, name in zip(panels, ("recall", "units_a_fact")):
        for kernel in kernels:
            at = [facts for facts in counts if (kernel, facts) in found]
            seen = [found[kernel, facts][name] for facts in at]
            axes.plot(
                [facts / settings["units"] for facts in at],
                [one.mean() for one in seen],
                label=kernel,
                **styles[kernel],
            )
        axes.set(xscale="log", xlabel=f"facts F for each of N = {settings['units']} units of two kernels")
    panels[0].set(ylabel="recall", ylim=(-0.03, 1.03))
    panels[1].set(yscale="log", ylabel="hidden units that answer a fact")
    for kernel, of_width in stored(done).items():
        panels[2].plot(list(of_width), list(of_width.values()), marker="o", **styles[kernel])
    panels[2].set(xscale="log", yscale="log", xlabel="units N of two kernels", ylabel="recall · F")
    widths = sorted({units for of_width in stored(done).values() for units in of_width})
    panels[2].set_xticks(widths, [str(units) for units in widths])
    panels[2].xaxis.minorticks_off()
    plain(panels[2], f"Facts stored, of F = {OVERLOAD} N")
    plain(panels[0], "Facts that are recalled")
    plain(panels[1], "Precision: few units answer")
    reference(panels[0], 1 / settings["values"], "chance")
    figure_legend(picture, *panels)
    # The number of facts at which the kernels differ most.
    apart = {facts: [_recall(found, kernel, facts) for kernel in kernels] for facts in counts}
    facts = max(counts, key=lambda facts: np.std(apart[facts]))
    best = sorted(kernels, key=lambda kernel: -_recall(found, kernel, facts))
    fewest = {
        kernel: [one["units_a_fact"].mean() for (name, _), one in found.items() if name == kernel] for kernel in kernels
    }
    precise = min(kernels, key=lambda kernel: np.mean(fewest[kernel]))
    title = (
        f"{precise} answers with the fewest units, {min(fewest[precise]):.1f} to {max(fewest[precise]):.1f} a fact; of "
        f"{facts:,} facts it recalls {_recall(found, precise, facts):.2f}, {best[0]} "
        f"{_recall(found, best[0], facts):.2f}"
    )
    explain(
        picture,
        title[0].upper() + title[1:],
        f"Random keys of width {settings['width']}, each with one of {settings['values']} random values, trained for "
        f"{settings['steps']} steps of all facts with Adam. All kernels have about "
        f"{done[0]['result']['parameters']:,} parameters. Units that answer: (Σ c)² / Σ c² of the units' shares.\n"
        "No number of the paper: the view is that of arXiv 2505.19488, the experiment is ours.",
    )
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="six minutes on two cores; --quick: half a minute",
)
