"""Retrieval from an associative memory: noise to signal by the number of pairs, the width and the similarity.

The memory holds N pairs (k_j, v_j) of standard Gaussian vectors of width d. Reading with a stored key k_i gives
Σ_j κ(k_j, k_i) v_j = c v_i + r, where c v_i is the signal and r the noise:

    1/SNR = E[‖r‖² / (c² ‖v_i‖²)] = N E[κ(k_j, k_i)²] / κ(k_i, k_i)²        for ‖k_i‖² = ‖v_i‖² = d, their mean:

    linear  N/d      relu  N/(2d)      relu²  3N/(2d²)      exp(x·y/τ), softmax  N exp(2 (1 − τ) d/τ²)

The pair (k_i, v_i) that is read has exactly these lengths; the other N − 1 pairs are drawn without that constraint.
e^{2x·y/τ} has a heavy tail: its sample mean is close to the formula only if the width is small compared with τ².
τ = √d is the scale of softmax attention. Source: Zhong et al., arXiv 2505.19488.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax.ops import Exp, Linear, Relu, Softmax
from deltaformer_jax.plot.style import GREY, MARKERS, explain, line_styles, plain, reference
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure, spread, values_of

FULL = dict(widths=(16, 32, 64, 128), pairs=(64, 256, 1024, 4096), trials=512)
QUICK = dict(widths=(16, 64), pairs=(64, 256, 1024), trials=256)
SIMILARITIES = ("linear", "relu", "relu²", "exp", "softmax")
FORMULAS = {
    "linear": "N / d",
    "relu": "N / (2d)",
    "relu²": "3N / (2d²)",
    "exp": "N exp(2(1 − τ)d / τ²)",
    "softmax": "as exp",
}
BATCH = 16  # trials at once


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    return [
        {
            "label": f"{name}, d = {width}, N = {pairs}",
            "similarity": name,
            "width": width,
            "pairs": pairs,
            "tau": math.sqrt(width) if name in ("exp", "softmax") else 1.0,
            "trials": sizes["trials"],
            "seed": 0,
        }
        for name in SIMILARITIES
        for width in sizes["widths"]
        for pairs in sizes["pairs"]
    ]


def by_formula(name: str, width: int, pairs: int, tau: float) -> float:
    """1/SNR by the formulas of this module's docstring."""
    return {
        "linear": pairs / width,
        "relu": pairs / (2 * width),
        "relu²": 3 * pairs / (2 * width**2),
        "exp": pairs * math.exp(2 * (1 - tau) * width / tau**2),
        "softmax": pairs * math.exp(2 * (1 - tau) * width / tau**2),
    }[name]


def weights_of(name: str, scores: jax.Array) -> jax.Array:
    """κ of the scaled scores [..., N] of a read, computed by the library's similarities."""
    if name == "relu²":
        return Relu().weight(scores) ** 2
    if name == "softmax":
        weights = Softmax().weight(scores)
        return weights / jnp.sum(weights, axis=-1, keepdims=True)
    return {"linear": Linear(), "relu": Relu(), "exp": Exp()}[name].weight(scores)


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    del folder, note
    name, width, pairs, tau = (settings[key] for key in ("similarity", "width", "pairs", "tau"))

    @jax.jit
    def trials(key):
        for_key, for_value = jax.random.split(key)
        keys = jax.random.normal(for_key, (BATCH, pairs, width))
        keys = first_of_length(math.sqrt(width), keys)
        values = first_of_length(math.sqrt(width), jax.random.normal(for_value, (BATCH, pairs, width)))
        with jax.default_matmul_precision("highest"):
            weights = weights_of(name, jnp.einsum("bnd,bd->bn", keys, keys[:, 0]) / tau)
            read = jnp.einsum("bn,bnv->bv", weights, values)
        signal = weights[:, :1] * values[:, 0]
        return jnp.sum((read - signal) ** 2, axis=-1) / jnp.sum(signal**2, axis=-1)

    found = drawn(trials, settings, stop)
    if found is None:
        return None
    formula = by_formula(name, width, pairs, tau)
    return {
        "inverse_snr": float(found.mean()),
        "standard_error": float(found.std(ddof=1) / math.sqrt(len(found))),
        "median": float(np.median(found)),
        "formula": formula,
        "ratio": float(found.mean() / formula),
    }


def drawn(trials, settings: dict[str, Any], stop) -> np.ndarray | None:
    """The results of settings["trials"] trials, from batches `trials(key)` of at least BATCH; None if stopped."""
    found = []
    for batch in range(-(-settings["trials"] // BATCH)):
        if stop.requested:
            return None
        found.append(np.asarray(trials(jax.random.key(settings["seed"] + batch)), np.float64))
    return np.concatenate(found)[: settings["trials"]]


def first_of_length(length: float, vectors: jax.Array) -> jax.Array:
    first = vectors[:, :1]
    return jnp.concatenate([first * (length / jnp.linalg.norm(first, axis=-1, keepdims=True)), vectors[:, 1:]], axis=1)


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "similarity": record["settings"]["similarity"],
            "width d": record["settings"]["width"],
            "pairs N": record["settings"]["pairs"],
            "1/SNR measured": f"{record['result']['inverse_snr']:.4g} ± {record['result']['standard_error']:.1g}",
            "formula": f"{record['result']['formula']:.4g}",
            "ratio": f"{record['result']['ratio']:.3f}",
            "median": f"{record['result']['median']:.4g}",
        }
        for record in done
    ]


def figure(done: list[dict[str, Any]]):
    picture = new_figure(14, 6.6)
    names, widths, counts = (values_of(done, key) for key in ("similarity", "width", "pairs"))
    styles = line_styles(widths)
    panels = picture.subplots(2, len(names), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 2))
    for (noise, ratio), name in zip(panels.T, names):
        for place, (width, shift) in enumerate(zip(widths, spread(len(widths), 0.5))):
            here = [r for r in done if (r["settings"]["similarity"], r["settings"]["width"]) == (name, width)]
            if not here:
                continue
            pairs = np.array([r["settings"]["pairs"] for r in here])
            means, errors, formulas = (
                np.array([r["result"][key] for r in here]) for key in ("inverse_snr", "standard_error", "formula")
            )
            mark = dict(marker=MARKERS[place], markersize=5, fillstyle="none", color=styles[width]["color"])
            noise.plot(pairs, means, linestyle="none", label=f"d = {width}, measured", **mark)
            noise.plot(pairs, formulas, linewidth=1, color=styles[width]["color"], label=f"d = {width}, the formula")
            # Side by side, so that no error bar hides another.
            spaced = pairs * 2**shift
            ratio.errorbar(spaced, means / formulas, 2 * errors / formulas, linestyle="none", capsize=2, **mark)
        noise.set(xscale="log", yscale="log", xlim=(min(counts) / 1.6, 1.6 * max(counts)))
        plain(noise, f"{name}: {FORMULAS[name]}")
        if name == names[-1]:
            reference(ratio, 1, "1: as the formula says")
        else:
            ratio.axhline(1, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0.5)
        ratio.set_xlabel("pairs N")
        ratio.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=8.5)
        ratio.minorticks_off()
        plain(ratio)
    panels[0, 0].set_ylabel("noise to signal, 1/SNR")
    panels[1, 0].set_ylabel("measured / formula\n(± 2 standard errors)")
    figure_legend(picture)
    ratios = [record["result"]["ratio"] for record in done]
    within = f"measured / formula is {min(ratios):.2f} to {max(ratios):.2f} in {len(done)} cells"
    follows = max(abs(ratio - 1) for ratio in ratios) < 0.2
    explain(
        picture,
        f"The noise of an associative memory {'follows' if follows else 'departs from'} the paper's formulas: {within}",
        "The paper's claim (arXiv 2505.19488): reading one of N stored pairs of Gaussian vectors of width d has a "
        "noise to signal of N E[κ(k_j, k_i)²] / κ(k_i, k_i)², which gives a formula for each similarity κ.\n"
        f"{done[0]['settings']['trials']} trials a cell; τ = √d for exp and softmax. N − 1 other pairs make the noise "
        "and the formula counts N, so few pairs lie a little below it.",
    )
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="ten minutes on two busy cores; --quick: a minute",
)
