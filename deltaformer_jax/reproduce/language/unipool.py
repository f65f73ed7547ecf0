"""Experts of each layer's own against one pool of experts that all layers share: byte models of code, several seeds.

UniPool (arXiv 2605.06665): the E L experts of L layers become one pool, each layer has a router over all of it, and the
norm router takes the place of the softmax. The loss falls by 0.024 to 0.037 nats at 182 million to 1.5 billion
parameters; pools of two thirds and of half as many experts still beat experts of each layer's own. The lock, which at
the end of UniPool's warm-up gives each expert to one layer, is not built.

Two things change at once there. Here each is also changed alone: experts (own, pool) by router (softmax, norm). A token
goes through one expert of a layer, so that it costs as much in all models (a pool's routers are E L wide, not E wide).
The softmax's probability is the expert's weight, not divided by the sum of one, which would leave the router without a
gradient of the text's loss. Models of a seed see the same rows in the same order. Compared are paired differences, the
mean over seeds of d_s = bits(model, s) − bits(own experts with the softmax, s), ± std(d)/√n.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from etils import epath

from deltaformer_jax.plot.style import GREY, explain, line_styles, plain
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import byte_model, mean_and_error, parameters, prepared, trained
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure

# Model -> (experts over those that all layers have of their own, or None: own ones; router).
MODELS = {
    "own, softmax": (None, "softmax"),
    "own, norm": (None, "norm"),
    "pool, softmax": (1.0, "softmax"),
    "pool, norm": (1.0, "norm"),
    "1/2 pool, norm": (1 / 2, "norm"),
}
VANILLA, UNIPOOL = "own, softmax", "pool, norm"
CONTROL = ("pool, softmax",)
CLAIMED = tuple(name for name in MODELS if name not in CONTROL)
QUICK_MODELS = (VANILLA, UNIPOOL, "1/2 pool, norm")
PAPER = (1.9317 - 1.9029, 1.7982 - 1.7615, 1.7568 - 1.7324, 1.7309 - 1.6944, 1.6320 - 1.6073)  # nats
FULL = dict(
    d_model=96,
    num_layers=4,
    num_heads=3,
    head_dim=32,
    mlp_dim=256,
    experts_of_a_layer=4,
    sequence_length=128,
    batch_size=8,
    steps=200,
    eval_batches=32,
    routed_batches=8,
    seeds=(0, 1, 2),
)
QUICK = FULL | dict(
    d_model=32, num_layers=3, num_heads=1, mlp_dim=88, steps=40, eval_batches=4, routed_batches=2, seeds=(0,)
)


def fields(model: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The fields of ModelConfig that make a model of MODELS."""
    pool, router = MODELS[model]
    own = sizes["experts_of_a_layer"]
    return {
        "feed_forward": "moe",
        "experts_per_token": 1,
        "num_experts": own if pool is None else round(pool * own * sizes["num_layers"]),
        "expert_pool": pool is not None,
        "router": router,
        "renormalise_experts": False,
    }


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = dict(sizes or (QUICK if quick else FULL))
    seeds = sizes.pop("seeds")
    return [
        {
            "label": f"{name}, seed {seed}".replace("/", " of "),
            "model": name,
            "mixers": ["softmax_attention"],
            "fields": fields(name, sizes),
            **sizes,
            "learning_rate": 4e-3,
            "seed": seed,
            "parameters": parameters(
                byte_model(sizes, ("softmax_attention",), sizes["mlp_dim"], **fields(name, sizes))
            ),
        }
        # The claim's models come first, seed by seed, so that an interrupted run has all of some seeds.
        for names in ((QUICK_MODELS,) if quick else (CLAIMED, CONTROL))
        for seed in seeds
        for name in names
    ]


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    prepared_run = prepared(settings, folder, note)
    found = trained(prepared_run, folder, stop)
    if found is None:
        return None
    counts = routed_counts(settings, folder, prepared_run.run.corpus)
    experts, layers = used(counts)
    return {**found, "counts": counts.astype(int).tolist(), "experts_of_a_layer": experts, "layers_of_expert": layers}


def routed_counts(settings: dict[str, Any], folder: epath.Path, corpus: Any) -> np.ndarray:
    """How many tokens of the first evaluation batches each layer sends to each expert, [layers, experts]."""
    from deltaformer_jax.data import batches
    from deltaformer_jax.model_parts import merge
    from deltaformer_jax.training.checkpoints.restore import restore

    restored = restore(folder / "run")
    model = merge(restored.program.parts, restored.params)
    given = dict(sequence_length=settings["sequence_length"], batch_size=settings["batch_size"], seed=0)
    read = itertools.islice(batches(corpus, "eval", **given), settings["routed_batches"])
    of_batch = lambda batch: model.routed(batch["tokens"], segment_ids=batch["segment_ids"])[1].counts
    return sum(np.asarray(of_batch(batch)) for batch in read)


def used(counts: np.ndarray) -> tuple[float, float]:
    """(experts of a layer, layers of an expert) that are in use, as exponentials of entropies.

        experts = mean over l of exp H(e | l),   layers = Σ_e p(e) exp H(l | e),   p(l, e) = counts / Σ counts

    Layers are those of a pool's experts; an expert of a layer's own has one, whatever its number says.
    """
    effective = lambda shares: float(np.exp(-np.sum(shares[shares > 0] * np.log(shares[shares > 0]))))
    joint = counts / counts.sum()
    experts = float(np.mean([effective(row / row.sum()) for row in joint]))
    layers = sum(column.sum() * effective(column / column.sum()) for column in joint.T if column.sum() > 0)
    return experts, float(layers)


def paired(done: list[dict[str, Any]], model: str, other: str = VANILLA) -> np.ndarray:
    """bits(model) − bits(other) of each seed that both were trained with."""
    bits = {(r["settings"]["model"], r["settings"]["seed"]): r["result"]["bits"] for r in done}
    seeds = sorted({seed for name, seed in bits if name == model and (other, seed) in bits})
    return np.array([bits[model, seed] - bits[other, seed] for seed in seeds])


def _of(done: list[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    return [record for record in done if record["settings"]["model"] == model]


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for model in MODELS:
        if not (here := _of(done, model)):
            continue
        mean = lambda key, here=here: np.mean([record["result"][key] for record in here])
        against = paired(done, model)
        own = MODELS[model][0] is None
        lines.append(
            {
                "experts, router": model,
                "parameters": f"{here[0]['settings']['parameters']:,}",
                "bits a byte": f"{mean('bits'):.4f}",
                f"minus {VANILLA}": "-" if model == VANILLA else mean_and_error(against),
                "seeds": len(here),
                "largest load": f"{mean('expert_load'):.2f}",
                "experts a layer uses": f"{mean('experts_of_a_layer'):.1f} of {len(here[0]['result']['counts'][0])}",
                "layers an expert serves": "1" if own else f"{mean('layers_of_expert'):.1f}",
            }
        )
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(15, 5)
    points, differences, use = picture.subplots(1, 3, width_ratios=(5, 5, 6))
    names = [name for name in MODELS if _of(done, name)]
    styles = line_styles(list(MODELS))
    for place, name in enumerate(names):
        look, found = styles[name]["color"], [record["result"]["bits"] for record in _of(done, name)]
        points.plot([place] * len(found), found, "o", color=look, label=name)
        against = paired(done, name)
        if name != VANILLA and len(against):
            error = against.std(ddof=1) / np.sqrt(len(against)) if len(against) > 1 else 0.0
            differences.errorbar(place, against.mean(), yerr=error, fmt="o", color=look, capsize=4)
    differences.axhline(0, color=GREY, linewidth=0.8)
    for axes, said in (
        (points, "bits a byte, evaluation split"),
        (differences, f"bits a byte minus those of {VANILLA}"),
    ):
        axes.set(xticks=[], xlim=(-0.5, len(names) - 0.5), ylabel=said)
    plain(points, "each point is a seed")
    plain(differences, f"paired differences from {VANILLA}")
    _draw_use(use, done)
    figure_legend(picture, points)
    gain = paired(done, UNIPOOL)
    gain = f"{mean_and_error(gain)} bits a byte" if len(gain) else "no seed has both yet"
    explain(
        picture,
        f"One pool of experts with the norm router, minus own experts with the softmax: {gain}",
        "The mean over seeds of the paired difference, ± its standard error; bars are standard errors. The paper "
        f"(UniPool, arXiv 2605.06665): {-max(PAPER):.3f} to {-min(PAPER):.3f} nats a token at 182 million to 1.5 "
        "billion parameters.",
    )
    return picture


def _draw_use(axes: Any, done: list[dict[str, Any]]) -> None:
    """The share of each layer's tokens that each expert gets, of the model nearest to UniPool's."""
    at_hand = _of(done, UNIPOOL) or [record for record in done if MODELS[record["settings"]["model"]][0]] or done
    counts = np.array(at_hand[0]["result"]["counts"], float)
    image = axes.imshow(counts / counts.sum(axis=1, keepdims=True), cmap="Blues", aspect="auto", vmin=0)
    axes.figure.colorbar(image, ax=axes, label="share of the layer's tokens")
    axes.set(xlabel="expert", ylabel="layer", yticks=range(len(counts)))
    axes.set_title(at_hand[0]["settings"]["label"], loc="left", fontsize=10.5)


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="a quarter of an hour on one idle core, 15 models; --quick: a minute and a quarter, three models",
)
