"""Noise to signal of a stored key, by the kernel of a feed-forward layer, the temperature, heads and experts.

A memory of N pairs of standard normal vectors of width d is read with a stored key k_i, ‖k_i‖² = d, as in `snr`. With
z = k_j·k_i/√d, which is standard normal for j ≠ i and √d for j = i:

    kernel        1/SNR = N E[f(z)²] / f(√d)²               f = relu, relu², gelu, silu, and z silu(z), z gelu(z): a
                                                            gated layer whose two keys are equal
    temperature   1/SNR = N exp(2 (1 − τ) d/τ²)             κ = exp(k_j·k_i/τ); least at τ = 2, N e^{−d/2}
    heads         linear N H/d, exp N exp(2 (1 − √(d/H)))   H memories of width d/H, each with τ = √(d/H)
    experts       k/E of the dense noise                    κ relu, pairs spread over E experts at random, k of them
                                                            read, the right one among them

Where experts are clusters of like keys (each pair goes to the nearest of E random centroids, and the k nearest are
read), like keys interfere more, and the share is above k/E. For k = 1, z has about the mean μ = m²/√d in the cluster,
m the expected largest of E standard normal numbers, and the share is 2/E ((1 + μ²) Φ(μ) + μ φ(μ)), with the normal
density φ and distribution Φ. For a low temperature κ² has so heavy a tail that its mean over any number of trials that
can be drawn is below the formula; the median is given beside it.

Source: the memory and its noise are those of Zhong et al., arXiv 2505.19488. E[f²] is integrated here; heads,
experts and what follows for τ are this library's.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax.plot.style import MARKERS, explain, line_styles, plain
from deltaformer_jax.reproduce.associative_memory.snr import BATCH, by_formula, drawn, first_of_length
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import new_figure, values_of

FULL = dict(
    pairs=(64, 256, 1024, 4096), width=64, tau_widths=(16, 64), heads_width=128, heads=(1, 2, 4, 8, 16), trials=512
)
QUICK = dict(pairs=(64, 256), width=32, tau_widths=(16,), heads_width=32, heads=(1, 4), trials=128)
STORED = 1024  # pairs, where their number is not what is varied
EXPERTS, OPEN = 16, (1, 2, 4, 8)
KERNELS = {
    "relu": jax.nn.relu,
    "relu²": lambda z: jax.nn.relu(z) ** 2,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "SwiGLU": lambda z: jax.nn.silu(z) * z,
    "GeGLU": lambda z: jax.nn.gelu(z) * z,
}
TITLES = {
    "kernel": ("kernel of a feed-forward layer", "pairs N"),
    "temperature": ("exp, by temperature", "τ / √d"),
    "heads": ("H memories of width d/H", "heads H"),
    "experts": (f"{EXPERTS} experts, relu", "experts that are read, k"),
}


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    rest = dict(trials=sizes["trials"], seed=0)
    stored = min(STORED, max(sizes["pairs"]))

    def cell(sweep: str, series: str, at: float, width: int, pairs: int) -> dict[str, Any]:
        label = f"{sweep}: {series}, {at:g}"
        return {"label": label, "sweep": sweep, "series": series, "at": at, "width": width, "pairs": pairs, **rest}

    return [
        *(cell("kernel", name, pairs, sizes["width"], pairs) for name in KERNELS for pairs in sizes["pairs"]),
        *(
            cell("temperature", f"d = {width}", at, width, stored)
            for width in sizes["tau_widths"]
            for at in (0.25, 0.5, 1.0, 2.0, math.sqrt(width))
        ),
        *(
            cell("heads", name, heads, sizes["heads_width"], stored)
            for name in ("linear", "exp")
            for heads in sizes["heads"]
        ),
        *(
            cell("experts", name, count, sizes["width"], stored)
            for name in ("at random", "like keys together")
            for count in OPEN
        ),
    ]


def expected(settings: dict[str, Any]) -> float | None:
    """1/SNR, or for experts the share of the dense noise, by the formulas of this module's docstring."""
    sweep, series, at, width, pairs = (settings[name] for name in ("sweep", "series", "at", "width", "pairs"))
    if sweep == "kernel":
        return pairs * second_moment(KERNELS[series]) / float(KERNELS[series](math.sqrt(width))) ** 2
    if sweep == "temperature":
        return by_formula("exp", width, pairs, at * math.sqrt(width))
    if sweep == "heads":
        return by_formula(series, width // int(at), pairs, math.sqrt(width / at))
    if series == "at random":
        return at / EXPERTS
    return 2 / EXPERTS * _moved_moment(largest_of(EXPERTS) ** 2 / math.sqrt(width)) if at == 1 else None


def _moved_moment(mean: float) -> float:
    """E[relu(z)²] of a normal z of variance 1 and this mean."""
    below = (1 + math.erf(mean / math.sqrt(2))) / 2
    return (1 + mean**2) * below + mean * math.exp(-(mean**2) / 2) / math.sqrt(2 * math.pi)


def largest_of(count: int) -> float:
    """The expected largest of `count` standard normal numbers, ∫ z d Φ(z)^count."""
    z = np.linspace(-12, 12, 24_001)
    below = np.array([(1 + math.erf(one / math.sqrt(2))) / 2 for one in z]) ** count
    return float(np.sum((z[1:] + z[:-1]) / 2 * np.diff(below)))


def second_moment(kernel) -> float:
    """E[f(z)²] for standard normal z, by the trapezoidal rule."""
    z = np.linspace(-12, 12, 24_001)
    return float(np.trapezoid(np.asarray(kernel(z), np.float64) ** 2 * np.exp(-(z**2) / 2), z) / math.sqrt(2 * math.pi))


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    del folder, note
    trials = jax.jit({"heads": _of_heads, "experts": _of_experts}.get(settings["sweep"], _of_kernel)(settings))
    found = drawn(trials, settings, stop)
    if found is None:
        return None
    formula = expected(settings)
    return {
        "measured": float(found.mean()),
        "standard_error": float(found.std(ddof=1) / math.sqrt(len(found))),
        "median": float(np.median(found)),
        "formula": formula,
        **({} if formula is None else {"ratio": float(found.mean() / formula)}),
    }


def _pairs(key, *shape: int) -> tuple[jax.Array, jax.Array]:
    """(keys, values) [..., N, d], the first key and value of length √d."""
    keys, values = (jax.random.normal(one, shape) for one in jax.random.split(key))
    length = math.sqrt(shape[-1])
    return first_of_length(length, keys), first_of_length(length, values)


def _noise_to_signal(weights, values) -> jax.Array:
    """‖Σ_{j≠0} κ_j v_j‖² / ‖κ_0 v_0‖² of weights [..., N] and values [..., N, d]."""
    signal = weights[..., :1] * values[..., 0, :]
    noise = jnp.einsum("...n,...nv->...v", weights, values, precision="highest") - signal
    return jnp.sum(noise**2, axis=-1) / jnp.sum(signal**2, axis=-1)


def _scores(keys, tau: float) -> jax.Array:
    return jnp.einsum("...nd,...d->...n", keys, keys[..., 0, :], precision="highest") / tau


def _of_kernel(settings):
    width, root = settings["width"], math.sqrt(settings["width"])
    kernel = KERNELS[settings["series"]] if settings["sweep"] == "kernel" else jnp.exp
    tau = root if settings["sweep"] == "kernel" else settings["at"] * root

    def trials(key):
        keys, values = _pairs(key, BATCH, settings["pairs"], width)
        return _noise_to_signal(kernel(_scores(keys, tau)), values)

    return trials


def _of_heads(settings):
    heads = int(settings["at"])
    width = settings["width"] // heads

    def trials(key):
        keys, values = _pairs(key, BATCH * heads, settings["pairs"], width)
        scores = _scores(keys, math.sqrt(width))
        weights = jnp.exp(scores) if settings["series"] == "exp" else scores
        return jnp.mean(_noise_to_signal(weights, values).reshape(BATCH, heads), axis=1)

    return trials


def _of_experts(settings):
    """The noise of the pairs in the experts that are read, over that of all pairs, means over the batch."""
    pairs, width, read = settings["pairs"], settings["width"], int(settings["at"])

    def trials(key):
        for_pairs, for_experts = jax.random.split(key)
        keys, values = _pairs(for_pairs, BATCH, pairs, width)
        if settings["series"] == "at random":
            expert = jax.random.randint(for_experts, (BATCH, pairs), 0, EXPERTS)
            is_read = (expert - expert[:, :1]) % EXPERTS < read
        else:
            centroids = jax.random.normal(for_experts, (BATCH, EXPERTS, width))
            # Of centroids of about one length, the nearest one has the largest product.
            near = jnp.einsum("bnd,bed->bne", keys, centroids, precision="highest")
            rank = jnp.argsort(jnp.argsort(-near[:, 0], axis=-1), axis=-1)
            is_read = jnp.take_along_axis(rank, jnp.argmax(near, axis=-1), axis=-1) < read
        scores = jax.nn.relu(_scores(keys, 1.0))
        sparse, dense = (_noise_to_signal(weights, values) for weights in (jnp.where(is_read, scores, 0), scores))
        return jnp.mean(sparse, keepdims=True) / jnp.mean(dense, keepdims=True)

    return trials


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for record in done:
        settings, result = record["settings"], record["result"]
        formula = result["formula"]
        lines.append(
            {
                "what": f"{settings['sweep']}: {settings['series']}",
                TITLES["kernel"][1] if settings["sweep"] == "kernel" else "at": f"{settings['at']:g}",
                "measured": f"{result['measured']:.4g} ± {result['standard_error']:.1g}",
                "formula": "-" if formula is None else f"{formula:.4g}",
                "ratio": "-" if formula is None else f"{result['ratio']:.3f}",
                "median": f"{result['median']:.4g}",
            }
        )
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(15, 4.8)
    panels = dict(zip(TITLES, picture.subplots(1, 4)))
    styles = line_styles(list(dict.fromkeys((r["settings"]["sweep"], r["settings"]["series"]) for r in done)))
    for sweep, axes in panels.items():
        here = [record for record in done if record["settings"]["sweep"] == sweep]
        for place, series in enumerate(values_of(here, "series")):
            line = [record for record in here if record["settings"]["series"] == series]
            at, style = [record["settings"]["at"] for record in line], styles[sweep, series]
            measured, medians = ([record["result"][name] for record in line] for name in ("measured", "median"))
            axes.scatter(at, measured, marker=MARKERS[place], facecolors="none", edgecolors=style["color"])
            if sweep == "temperature":
                axes.scatter(at, medians, marker="x", color=style["color"], s=16)
            known = [(x, record["result"]["formula"]) for x, record in zip(at, line) if record["result"]["formula"]]
            axes.plot(
                *(zip(*known) if known else ((), ())),
                **style | {"linewidth": 1},
                marker=MARKERS[place],
                fillstyle="none",
                markersize=0 if len(known) > 1 else 9,
                label=series,
            )
        title, below = TITLES[sweep]
        axes.set(xscale="log", yscale="log", xlabel=below)
        axes.set_xticks(
            ticks := sorted({r["settings"]["at"] for r in here}), [f"{at:,g}" for at in ticks], fontsize=8.5
        )
        axes.minorticks_off()
        if here:
            axes.legend(fontsize=8, frameon=False)
        plain(axes, title)
    panels["kernel"].set_ylabel("noise to signal, 1/SNR")
    panels["experts"].set_ylabel("share of the dense noise")
    followed = [record["result"]["ratio"] for record in done if record["settings"]["sweep"] in ("kernel", "heads")]
    clustered = [r["result"]["measured"] for r in done if r["settings"]["series"] == "like keys together"]
    title = "A gate buys what squaring buys; a memory cut into heads is noisier"
    if followed:
        title += f": measured / formula is {min(followed):.2f} to {max(followed):.2f}"
    settings = done[0]["settings"]
    explain(
        picture,
        title,
        f"Marks: the mean of {settings['trials']} trials. Lines: the formulas. Crosses: the median, far below the mean "
        "where the weights have a heavy tail. The gated kernels have two equal keys a unit. "
        + (f"Of {EXPERTS} experts of like keys, one holds {clustered[0]:.3f} of the noise. " if clustered else "")
        + "The noise of an associative memory is that of arXiv 2505.19488; heads, experts and temperatures are ours.",
    )
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="three minutes on one core, nothing is trained; --quick: 45 s",
)
