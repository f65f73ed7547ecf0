"""KV shifting's theorems 2 and 3: one layer is an induction head exactly, and where the loss of its scalars leads.

Theorem 2. With k'_s = x_{s−1} and v'_s = x_s, which is α = (0, 1) and β = (1, 0), attention of the last token with the
score k'_s·x_L/σ − m|L − s| over 2 ≤ s < L is the induction head

    Σ_s softmax_s(x_L·x_{s−1}/σ − m|L − s|) x_s.

The paper's proof prints β = 1/σ. The factor 1/σ belongs to the score.

Theorem 3. A row x_1 … x_T of orthonormal embeddings, then x_i again, 2 ≤ i ≤ T − 2. The query is the last token, keys
and values are k'_s = α₁x_s + α₂x_{s−1} and v'_s = β₁x_s + β₂x_{s−1}, the scale is 1. With S = 2e^{α₁} + e^{α₂} + T − 2,
a₁ = e^{α₁}/S and a₂ = e^{α₂}/S the logits o·x_t are

    t = i + 1, the answer   a₂β₁ + β₂/S             t = i − 1, t = T   β₁/S + a₁β₂
    t = i                   2a₁β₁ + a₂β₂            T − 4 others       (β₁ + β₂)/S

and the loss is −log softmax at i + 1. The paper's eq. 10 and Table 5 print a₂β₂ at i − 1 and T; its own derivation and
the attention itself give a₁β₂. The landscape is over (α₁, β₁) with α₂ = 1 − α₁ and β₂ = 1 − β₁, as the layer begins.

Source: Xu et al., "KV Shifting Attention Enhances Language Modeling", arXiv 2411.19574, theorems 2 and 3, Figure 2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax.ops import causal_attention, shift_mix
from deltaformer_jax.plot.style import COLOURS, explain, plain
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import new_figure

HIDDEN = -1e4  # a score that hides a key: in float64 exp(−1e4) is 0, whatever is added
FULL = dict(widths=(8, 64), length=64, rows=64, others=(0, 10, 100), grid=61, points=64, steps=20_000)
QUICK = dict(widths=(8,), length=32, rows=8, others=(0, 10, 100), grid=31, points=16, steps=5_000)
RATE = 1.0  # of gradient descent on two scalars whose gradient is at most about 1


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    exact = [
        {
            "label": f"theorem 2, width {width}",
            "kind": "theorem 2",
            "width": width,
            **{key: sizes[key] for key in ("length", "rows")},
            "sigma": 0.5,
            "slope": 0.1,
            "seed": 0,
        }
        for width in sizes["widths"]
    ]
    landscapes = [
        {
            "label": f"theorem 3, {others} other words",
            "kind": "theorem 3",
            "others": others,
            **{key: sizes[key] for key in ("grid", "points", "steps")},
            "range": [-0.5, 1.5],
            "rate": RATE,
            "seed": 0,
        }
        for others in sizes["others"]
    ]
    return [*exact, *landscapes]


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    del folder, note, stop  # a cell takes seconds
    with jax.enable_x64(True):
        return _theorem2(settings) if settings["kind"] == "theorem 2" else _theorem3(settings)


# Theorem 2.


def _theorem2(settings: dict[str, Any]) -> dict[str, Any]:
    shape = (settings["rows"], settings["length"], settings["width"])
    x = np.random.default_rng(settings["seed"]).standard_normal(shape) / np.sqrt(settings["width"])
    expected = induction_head(x, settings["sigma"], settings["slope"])
    found = one_layer(x, settings["sigma"], settings["slope"])
    return {"error": float(np.abs(found - expected).max()), "largest": float(np.abs(expected).max())}


def induction_head(x: np.ndarray, sigma: float, slope: float) -> np.ndarray:
    """Σ_{2≤s<L} softmax_s(x_L·x_{s−1}/σ − m (L − s)) x_s of each row of x [N, L, d]: [N, d]."""
    length = x.shape[1]
    before, at = x[:, : length - 2], x[:, 1 : length - 1]  # x_{s−1} and x_s
    scores = np.einsum("nd,nsd->ns", x[:, -1], before) / sigma - slope * np.arange(length - 2, 0, -1)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("ns,nsd->nd", weights / weights.sum(axis=1, keepdims=True), at)


def one_layer(x: np.ndarray, sigma: float, slope: float) -> np.ndarray:
    """The same by the library's KV shifting and attention, in which the slope m is a constant decay of the scores.

    The first key, which is 0, and the last are hidden by a further feature of keys and queries.
    """
    x = jnp.asarray(x)[:, :, None]
    number = lambda value: jnp.full(1, value, x.dtype)
    key, value = shift_mix(x, number(0), number(1)), shift_mix(x, number(1), number(0))
    hide = jnp.zeros(x.shape[:3]).at[:, 0].set(HIDDEN).at[:, -1].set(HIDDEN)[..., None]
    return np.asarray(
        causal_attention(
            jnp.concatenate([x / sigma, jnp.ones_like(hide)], axis=-1),
            jnp.concatenate([key, hide], axis=-1),
            value,
            scale=1.0,
            log_decay=jnp.full(x.shape[:3], -slope, x.dtype),
            implementation="parallel",
        )[:, -1, 0]
    )


# Theorem 3.


def logits(alpha, beta, words: int, printed: bool = False):
    """(of i + 1, i, each of i − 1 and T, each of the T − 4 others) for α = (α₁, α₂), β = (β₁, β₂) and T = `words`.

    printed: as the paper's eq. 10 has it, with a₂ where the attention has a₁.
    """
    one, two = jnp.exp(alpha[0]), jnp.exp(alpha[1])
    total = 2 * one + two + words - 2
    one, two = one / total, two / total
    beside = beta[0] / total + beta[1] * (two if printed else one)
    return (
        two * beta[0] + beta[1] / total,
        2 * one * beta[0] + two * beta[1],
        beside,
        (beta[0] + beta[1]) / total,
    )


def loss(alpha, beta, words: int, printed: bool = False):
    """−log softmax at i + 1, in nats."""
    answer, own, beside, other = logits(alpha, beta, words, printed)
    return jnp.log(jnp.exp(answer) + jnp.exp(own) + 2 * jnp.exp(beside) + (words - 4) * jnp.exp(other)) - answer


def attention_logits(alpha, beta, words: int, repeated: int) -> np.ndarray:
    """The logits [T] of all words by the library's ops: x_1 … x_T, then x_i with i = `repeated`, counted from 1."""
    x = jnp.eye(words)[jnp.array([*range(words), repeated - 1])][None, :, None]
    mixed = [shift_mix(x, *(jnp.full(1, scalar, x.dtype) for scalar in pair)) for pair in (alpha, beta)]
    return np.asarray(causal_attention(x, *mixed, scale=1.0, implementation="parallel")[0, -1, 0])


def attention_loss(alpha, beta, words: int, repeated: int) -> float:
    scores = attention_logits(alpha, beta, words, repeated)
    return float(np.log(np.exp(scores).sum()) - scores[repeated])


def _theorem3(settings: dict[str, Any]) -> dict[str, Any]:
    words = settings["others"] + 4
    random = np.random.default_rng(settings["seed"])
    wrong = {False: 0.0, True: 0.0}
    for _ in range(settings["points"]):
        alpha, beta = random.uniform(-1, 2, (2, 2))
        expected = attention_loss(alpha, beta, words, int(random.integers(2, words - 1)))
        for printed in wrong:
            wrong[printed] = max(wrong[printed], abs(float(loss(alpha, beta, words, printed)) - expected))
    begun = lambda first: (first, 1 - first)
    at = lambda point: loss(begun(point[0]), begun(point[1]), words)
    axis = np.linspace(*settings["range"], settings["grid"])
    grid = jax.vmap(lambda b: jax.vmap(lambda a: at((a, b)))(jnp.asarray(axis)))(jnp.asarray(axis))  # [β₁, α₁]

    def step(point, _):
        return point - settings["rate"] * jax.grad(at)(point), point

    path = np.asarray(jax.lax.scan(step, jnp.array([0.5, 0.5]), None, length=settings["steps"])[1])
    inside = path[np.all((path >= axis[0]) & (path <= axis[-1]), axis=1)]
    return {
        "error": wrong[False],
        "error_of_printed": wrong[True],
        "axis": [float(axis[0]), float(axis[-1]), len(axis)],
        "losses": np.round(np.asarray(grid), 6).tolist(),
        "path": np.round(inside[np.unique(np.geomspace(1, len(inside), 60).astype(int)) - 1], 5).tolist(),
        "end": path[-1].tolist(),
    }


# Results.


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "what": record["settings"]["label"],
            "error": f"{record['result']['error']:.1e}",
            "error of the printed formula": f"{record['result'].get('error_of_printed', np.nan):.1e}".replace(
                "nan", "–"
            ),
            "descent from (½, ½) ends at (α₁, β₁)": ", ".join(f"{x:.2f}" for x in record["result"].get("end", ()))
            or "–",
        }
        for record in done
    ]


def figure(done: list[dict[str, Any]]):
    landscapes = [record for record in done if record["settings"]["kind"] == "theorem 3"]
    picture = new_figure(max(9.0, 4.6 * len(landscapes)), 5.4)
    panels = picture.subplots(1, max(1, len(landscapes)), squeeze=False)[0]
    for panel, record in zip(panels, landscapes):
        low, high, count = record["result"]["axis"]
        axis = np.linspace(low, high, count)
        shown = panel.contourf(axis, axis, record["result"]["losses"], levels=16, cmap="cividis")
        picture.colorbar(shown, ax=panel, label="loss, nats", shrink=0.85)
        alpha, beta = np.array(record["result"]["path"]).T
        panel.plot(alpha, beta, color=COLOURS[1], linewidth=2.2, label="gradient descent from (½, ½)")
        panel.plot(0, 1, "*", color="white", markersize=13, markeredgecolor="black", label="Theorem 2's layer, (0, 1)")
        panel.set(xlabel="α₁, with α₂ = 1 − α₁", ylabel="β₁, with β₂ = 1 − β₁", xlim=(low, high), ylim=(low, high))
        plain(panel, f"{record['settings']['others']} other words, T = {record['settings']['others'] + 4}", grid="x")
        panel.grid(False)
    if landscapes:
        panels[0].legend(fontsize=8.5, loc="lower left")
    explain(
        picture,
        _finding(done),
        "The paper's claims (arXiv 2411.19574): one layer with KV shifting is an induction head exactly (Theorem 2); "
        "gradient descent on its scalars leads there (Theorem 3, Figure 2).\n"
        "T words with orthonormal embeddings, then one of them again, which asks for the word after it. Computed in "
        "float64, nothing trained. The paper prints a₂β₂ where its derivation and the attention give a₁β₂, used here.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    heads = [r["result"]["error"] for r in done if r["settings"]["kind"] == "theorem 2"]
    ends = [r["result"]["end"] for r in done if r["settings"]["kind"] == "theorem 3"]
    parts = []
    if heads:
        parts.append(f"One layer with KV shifting is an induction head up to an error of {max(heads):.0e}")
    if ends:
        there = sum(alpha < 0.5 < beta for alpha, beta in ends)
        parts.append(f"gradient descent goes towards it, from (½, ½), in {there} of {len(ends)} landscapes")
    return "; ".join(parts)


EXPERIMENT = Experiment(
    cells=cells, run=run, rows=rows, figure=figure, cost="half a minute on two busy cores; --quick: ten seconds"
)
