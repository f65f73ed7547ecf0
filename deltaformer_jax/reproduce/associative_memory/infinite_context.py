"""What a memory knows after infinitely many examples: v = W k + σ n, n standard normal, with W fixed.

The error e_t after t pairs, in expectation. With W [d_v, d], keys uniform on the unit sphere, and S the memory's state:

    additive       S = (d/t) Σ v kᵀ                     e = ‖S − W‖² = N/t,     N = (d − 1)‖W‖² + d² σ² d_v
    decay γ        S = (1 − γ) d Σ γ^{t−i} v_i k_iᵀ     e → N (1 − γ)/(1 + γ)
    delta rule β   S ← S + β (v − S k) kᵀ               e → β σ² d_v d/(2 − β), by 1 − (2β − β²)/d a token
    delta rule     the same with β_t = d/(t + d)        e → d² σ² d_v / t
    skewed keys    additive, keys of covariance Σ       e → ‖W (dΣ − 1)‖², however many examples

With standard normal keys and a fixed query q, attention reads o = Σ softmax(k_i·q/τ) v_i:

    softmax        o → W q/τ                            e = ‖o − W q‖² → (1 − 1/τ)² ‖W q‖²; o·W q/‖W q‖² → 1/τ

and DeltaFormer, which has no closed form, is measured. So more context does not help past these floors: a constant
gate forgets, a constant step follows the noise, and attention averages near keys.

All states and reads are those of the library's ops. Source: the question, "infinite context is not infinite
intelligence", is of Zhong et al., arXiv 2505.19488; the closed forms are this library's.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax.ops import causal_attention, delta_attention, gated_delta_rule, gated_linear_attention
from deltaformer_jax.plot.style import explain, line_styles, plain
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure

FULL = dict(width=16, sigma=0.3, trials=200, tokens=8192, read_tokens=2048)
QUICK = dict(width=8, sigma=0.3, trials=64, tokens=2048, read_tokens=512)
PIECE = 64  # tokens between two errors
# Label -> (kind, its number).
RULES = {
    "additive": ("additive", 0.0),
    "additive, skewed keys": ("skewed", 3.0),
    "decay 0.99": ("decay", 0.99),
    "delta rule, β = 0.1": ("delta", 0.1),
    "delta rule, β = 0.5": ("delta", 0.5),
    "delta rule, β = 1": ("delta", 1.0),
    "delta rule, β = d/(t + d)": ("falling", 0.0),
    "softmax, τ = 1": ("softmax", 1.0),
    "softmax, τ = 2": ("softmax", 2.0),
    "softmax, τ = 4": ("softmax", 4.0),
    "DeltaFormer, τ = 2": ("delta_former", 2.0),
    "DeltaFormer, τ = 4": ("delta_former", 4.0),
}
READS = ("softmax", "delta_former")
FALLING = ("additive", "falling")


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    return [
        {"label": name, "kind": kind, "number": number, **sizes, "seed": 0} for name, (kind, number) in RULES.items()
    ]


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    del folder, note
    if stop.requested:
        return None
    key = jax.random.key(settings["seed"])
    slopes = None
    if settings["kind"] in READS:
        errors, slopes = _of_reads(settings, key)
    else:
        errors = _of_states(settings, key)
    tokens = PIECE * np.arange(1, len(errors) + 1)
    found = {"tokens": tokens.tolist(), "errors": errors.tolist(), "formula": _expected(settings)}
    # Without a floor e t has a limit.
    limits = errors * tokens if settings["kind"] in FALLING else errors if slopes is None else slopes
    found["measured"] = float(np.mean(limits[len(limits) // 2 :]))
    if found["formula"] is not None:
        found["ratio"] = found["measured"] / found["formula"]
    return found


def _expected(settings: dict[str, Any]) -> float | None:
    """The limit of the relative error, of error · t or of a read's slope. E‖W‖² = d, for entries of variance 1/d."""
    d, variance, number = settings["width"], settings["sigma"] ** 2, settings["number"]
    noise = (d - 1) * d + d**3 * variance
    formulas = {
        "additive": lambda: noise / d,
        "decay": lambda: noise / d * (1 - number) / (1 + number),
        "delta": lambda: number * variance * d / (2 - number),
        "falling": lambda: d**2 * variance,
        "skewed": lambda: float(np.mean((_skew(d, number) - 1) ** 2)),
        "softmax": lambda: 1 / number,
        "delta_former": lambda: None,
    }
    return formulas[settings["kind"]]()


def _skew(width: int, most: float) -> np.ndarray:
    """d times the eigenvalues of the keys' covariance, of mean 1: half of them `most` times the others."""
    values = np.where(np.arange(width) < width // 2, most, 1.0)
    return values / values.mean()


def _of_states(settings: dict[str, Any], key: jax.Array) -> np.ndarray:
    """‖S − W‖² / ‖W‖² after every PIECE tokens, the mean over trials."""
    d, trials, kind, number = (settings[name] for name in ("width", "trials", "kind", "number"))
    for_weights, for_pairs = jax.random.split(key)
    weights = jax.random.normal(for_weights, (trials, d, d)) / math.sqrt(d)  # [trials, key, value]

    @jax.jit
    def piece(state, step):
        for_keys, for_noise = jax.random.split(jax.random.fold_in(for_pairs, step))
        keys = jax.random.normal(for_keys, (trials, PIECE, 1, d))
        if kind == "skewed":
            keys = keys * jnp.sqrt(jnp.asarray(_skew(d, number), jnp.float32) / d)
        else:
            keys = keys / jnp.linalg.norm(keys, axis=-1, keepdims=True)
        noise = settings["sigma"] * jax.random.normal(for_noise, (trials, PIECE, 1, d))
        values = jnp.einsum("bthk,bkv->bthv", keys, weights, precision="highest") + noise
        arrays = dict(query=keys, key=keys, value=values, initial_state=state, chunk_size=16)
        if kind in ("additive", "skewed"):
            _, state = gated_linear_attention(**arrays)
            return state, state * d / (PIECE * (step + 1))
        if kind == "decay":
            decay = jnp.full((trials, PIECE, 1), math.log(number), jnp.float32)
            _, state = gated_linear_attention(**arrays, log_decay=decay)
            return state, state * d * (1 - number)
        seen = PIECE * step + jnp.arange(PIECE)
        beta = d / (seen + d) if kind == "falling" else jnp.full((PIECE,), number)
        beta = jnp.broadcast_to(beta[None, :, None].astype(jnp.float32), (trials, PIECE, 1))
        _, state = gated_delta_rule(**arrays, beta=beta)
        return state, state

    state, errors = jnp.zeros((trials, 1, d, d)), []
    for step in range(settings["tokens"] // PIECE):
        state, guess = piece(state, step)
        apart = jnp.sum((guess[:, 0] - weights) ** 2) / jnp.sum(weights**2)
        errors.append(float(apart))
    return np.array(errors)


def _of_reads(settings: dict[str, Any], key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(‖o − W q‖² / ‖W q‖², o·W q / ‖W q‖²) of a query of length 1 after every PIECE tokens, means over trials."""
    d, trials, length, tau = (settings[name] for name in ("width", "trials", "read_tokens", "number"))
    for_weights, for_keys, for_noise, for_query = jax.random.split(key, 4)
    weights = jax.random.normal(for_weights, (trials, d, d)) / math.sqrt(d)
    keys = jax.random.normal(for_keys, (trials, length, 1, d))
    noise = settings["sigma"] * jax.random.normal(for_noise, (trials, length, 1, d))
    query = jax.random.normal(for_query, (trials, 1, 1, d))
    query = query / jnp.linalg.norm(query, axis=-1, keepdims=True)
    product = lambda x: jnp.einsum("bthk,bkv->bthv", x, weights, precision="highest")
    values, right = product(keys) + noise, product(query)
    queries = jnp.broadcast_to(query, keys.shape)
    if settings["kind"] == "softmax":
        read = causal_attention(queries, keys, values, scale=1 / tau)
    else:
        read = delta_attention(queries, keys, values, write_scale=1 / tau, read_scale=1 / tau)
    sums = (jnp.sum(x, axis=(0, 2, 3)) / jnp.sum(right**2) for x in ((read - right) ** 2, read * right))
    errors, slopes = (np.asarray(x, np.float64)[PIECE - 1 :: PIECE] for x in sums)
    return errors, slopes


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for record in done:
        result, kind = record["result"], record["settings"]["kind"]
        lines.append(
            {
                "memory": record["settings"]["label"],
                "limit of": "error · tokens" if kind in FALLING else "slope" if kind in READS else "error",
                "measured": f"{result['measured']:.4g}",
                "formula": "-" if result["formula"] is None else f"{result['formula']:.4g}",
                "ratio": f"{result['ratio']:.3f}" if "ratio" in result else "-",
            }
        )
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(14, 6)
    panels = picture.subplots(1, 2)
    styles = line_styles([record["settings"]["label"] for record in done])
    for record in done:
        settings, result = record["settings"], record["result"]
        axes = panels[int(settings["kind"] in READS)]
        axes.plot(result["tokens"], result["errors"], label=settings["label"], **styles[settings["label"]])
        floor = result["formula"]
        if settings["kind"] == "softmax":
            floor = (1 - floor) ** 2
        if floor and settings["kind"] not in FALLING:
            axes.axhline(floor, color=styles[settings["label"]]["color"], linewidth=0.8, linestyle=":")
    for axes, title in zip(panels, ("A state: ‖S − W‖² / ‖W‖²", "A read: ‖o − W q‖² / ‖W q‖²")):
        axes.set(xscale="log", yscale="log", xlabel="examples seen", ylabel="relative error")
        plain(axes, title)
    figure_legend(picture, *panels)
    settings = done[0]["settings"]
    off = [abs(record["result"]["ratio"] - 1) for record in done if "ratio" in record["result"]]
    within = f": floors within {100 * max(off):.0f} % of their formulas" if off else ", whatever their number is"
    explain(
        picture,
        f"More examples stop helping a memory{within}",
        f"v = W k + {settings['sigma']} n, width {settings['width']}, {settings['trials']} trials. Dotted: the "
        "formulas. Flat: a decay forgets, a constant β follows the noise, skewed keys and softmax are biased. Falling: "
        "sums, and a β that falls as 1/t.\nThe closed forms are this library's; the question is that of arXiv "
        "2505.19488.",
    )
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="a minute on one core, nothing is trained; --quick: half a minute",
)
