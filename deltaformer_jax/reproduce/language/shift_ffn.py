"""Does Shift-FFN keep a model that is trained from scratch from repeating itself?

The paper says that models repeat themselves where neighbouring tokens have much the same representations, and that an
editor of the feed-forward layers' input by the token before, trained beside LoRA, makes both better. Here byte models
of the standard library's text are trained from scratch: with the editor, with KV shifting, with short convolutions of
queries, keys and values, and with neither, as many parameters each by the width of their feed-forward layers. At each
quarter of the training:

* bits a byte of the evaluation split;
* M(X), by layer: the mean of ‖h_t − h_{t−1}‖ / ‖h_{t−1}‖ on that text (`surgery.token_change`);
* the loop rate: 64 prompts, the beginnings of rows of that text, are continued greedily by 512 bytes. A continuation
  is a loop if its last 128 bytes repeat with a period of at most 64;
* the bytes before a loop begins, of a continuation that is none all of it.

Source: "Shift-FFN", arXiv 2505.17153. M(X) and loops are its measures; small models and training from scratch are not
its setting.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from etils import epath

from deltaformer_jax.config import Mixer
from deltaformer_jax.plot.style import explain, line_styles, plain
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import byte_model, matched, parameters, prepared
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure, values_of

NEITHER, EDITOR = "neither", "Shift-FFN, r = 16"
MODELS: dict[str, dict[str, Any]] = {
    NEITHER: {},
    EDITOR: dict(ffn_shift_rank=16),
    "KV shifting": dict(kv_shift=True),
    "convolutions": dict(conv_size=4),
}
PERIOD, REPEATED = 64, 128  # the longest period of a loop, and the last bytes that must repeat with it
FULL = dict(
    model=dict(d_model=64, num_layers=4, num_heads=2, head_dim=32, sequence_length=512, batch_size=4, steps=400),
    measures=dict(eval_batches=32, measured_batches=8, prompts=64, prompt_bytes=32, continuation=512),
    seeds=(0,),
)
QUICK = dict(
    model=dict(d_model=32, num_layers=2, num_heads=1, head_dim=32, sequence_length=128, batch_size=4, steps=60),
    measures=dict(eval_batches=4, measured_batches=2, prompts=16, prompt_bytes=16, continuation=160),
    seeds=(0,),
)


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    model = sizes["model"]
    pattern = {name: (Mixer("softmax_attention", **options),) for name, options in MODELS.items()}
    target = parameters(byte_model(model, pattern[NEITHER], mlp_dim=0))
    return [
        {
            "label": f"{name}, seed {seed}",
            "model": name,
            **matched(model, pattern[name], target, seed),
            **sizes["measures"],
        }
        for seed in sizes["seeds"]
        for name in MODELS
    ]


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    from deltaformer_jax.data import batches
    from deltaformer_jax.model_parts import merge
    from deltaformer_jax.surgery import token_change
    from deltaformer_jax.training.checkpoints.restore import restore
    from deltaformer_jax.training.loop import train

    run, position, state = prepared(settings, folder, note, checkpoints=4)
    if not train(run, position, state, stop, quiet=True).finished:
        return None
    bits = {r["step"]: r["eval_bits_per_byte"] for r in run.metrics.records if "eval_bits_per_byte" in r}
    length, rows_of_batch = settings["sequence_length"], settings["batch_size"]
    evaluation = lambda: batches(run.corpus, "eval", sequence_length=length, batch_size=rows_of_batch, seed=0)
    measured = list(itertools.islice(evaluation(), settings["measured_batches"]))
    prompts = beginnings(evaluation(), settings["prompts"], settings["prompt_bytes"])
    found = []
    for step in sorted(run.checkpoints.steps()):
        if stop.requested:
            return None
        restored = restore(folder / "run", step)
        model = merge(restored.program.parts, restored.params)
        texts = continuations(model, prompts, settings["continuation"])
        periods = [loop_period(row) for row in texts]
        found.append(
            {
                "step": step,
                "bits": bits[step],
                "change": token_change(model, measured).tolist(),
                "loops": float(np.mean([period is not None for period in periods])),
                "before_loop": float(np.mean([before_loop(*each) for each in zip(texts, periods)])),
                "periods": periods,
            }
        )
        last = found[-1]
        note(
            f"step {step}: M(X) {np.mean(last['change']):.3f}, loop rate {last['loops']:.2f}, bytes before a loop "
            f"{last['before_loop']:.0f}"
        )
    return {"checkpoints": found}


def beginnings(batches, number: int, size: int) -> list[list[int]]:
    """The first `size` bytes of the rows that begin with as many of one document, `number` of them."""
    found = []
    for batch in batches:
        for tokens, ids in zip(batch["tokens"], batch["segment_ids"]):
            if ids[0] != 0 and np.all(ids[:size] == ids[0]):
                found.append([int(token) for token in tokens[:size]])
            if len(found) == number:
                return found
    raise ValueError(f"the evaluation split has {len(found)} rows that begin with {size} bytes of one document")


def continuations(model, prompts: list[list[int]], tokens: int) -> np.ndarray:
    """The greedy continuations, int32 [len(prompts), tokens]."""
    from deltaformer_jax.decoding.generate import generate_batch

    return np.stack(list(generate_batch(model, prompts, tokens, temperature=0.0)), axis=1)


def loop_period(tokens: np.ndarray) -> int | None:
    """The least period, up to PERIOD, with which the last REPEATED tokens repeat, or None."""
    last = np.asarray(tokens)[-REPEATED:]
    return next((p for p in range(1, PERIOD + 1) if np.array_equal(last[p:], last[:-p])), None)


def before_loop(tokens: np.ndarray, period: int | None) -> int:
    """How many tokens come before the part that repeats to the end; all if there is none."""
    if period is None:
        return len(tokens)
    differ = np.flatnonzero(tokens[period:] != tokens[:-period])
    return int(differ[-1]) + 1 if len(differ) else 0


def _last(done: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The last checkpoint of each seed of a model."""
    return [record["result"]["checkpoints"][-1] for record in done if record["settings"]["model"] == name]


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for name in values_of(done, "model"):
        last = _last(done, name)
        each = lambda text, last=last: " ".join(map(text, last))
        by_layer = np.mean([one["change"] for one in last], axis=0)
        lines.append(
            {
                "model": name,
                "bits a byte": each(lambda one: f"{one['bits']:.3f}"),
                "M(X)": each(lambda one: f"{np.mean(one['change']):.3f}"),
                "M by layer": " ".join(f"{value:.2f}" for value in by_layer),
                "loop rate": each(lambda one: f"{one['loops']:.2f}"),
                "bytes before a loop": each(lambda one: f"{one['before_loop']:.0f}"),
                "parameters": next(r["settings"]["parameters"] for r in done if r["settings"]["model"] == name),
            }
        )
    return lines


def correlation(done: list[dict[str, Any]]) -> float | None:
    """Pearson's, of M(X) and the loop rate over the checkpoints of all models; None if one of them does not vary."""
    points = [(np.mean(one["change"]), one["loops"]) for r in done for one in r["result"]["checkpoints"]]
    x, y = np.array(points).T
    return float(np.corrcoef(x, y)[0, 1]) if len(points) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0 else None


def figure(done: list[dict[str, Any]]):
    picture = new_figure(18, 5)
    by_layer, over_steps, before, against = picture.subplots(1, 4)
    names = values_of(done, "model")
    styles = line_styles(names, [NEITHER] if NEITHER in names else [])
    for record in done:
        name, checkpoints = record["settings"]["model"], record["result"]["checkpoints"]
        style, of = styles[name], lambda key, checkpoints=checkpoints: [one[key] for one in checkpoints]
        change = [np.mean(values) for values in of("change")]
        by_layer.plot(range(len(checkpoints[-1]["change"])), checkpoints[-1]["change"], label=name, **style)
        over_steps.plot(of("step"), of("loops"), **style)
        before.plot(of("step"), of("before_loop"), **style)
        against.plot(change, of("loops"), "o", color=style["color"])
        against.plot(change[-1:], of("loops")[-1:], "o", markersize=11, fillstyle="none", color=style["color"])
    by_layer.set(xlabel="layer", ylabel="M, change from token to token")
    by_layer.set_xticks(range(done[0]["settings"]["num_layers"]))
    over_steps.set(xlabel="training step", ylabel="loop rate", ylim=(-0.03, 1.03))
    before.set(xlabel="training step", ylabel="bytes", ylim=(0, 1.03 * done[0]["settings"]["continuation"]))
    against.set(xlabel="M(X)", ylabel="loop rate", ylim=(-0.03, 1.03))
    plain(by_layer, "After training")
    plain(over_steps, "Greedy continuations that loop")
    plain(before, "Bytes before a loop begins")
    plain(against, "Each quarter of each training; rings: its end")
    figure_legend(picture, by_layer)
    settings = done[0]["settings"]
    explain(
        picture,
        _finding(done),
        f"Byte models of about {settings['parameters']:,} parameters, {len(values_of(done, 'seed'))} of each kind. "
        f"{settings['prompts']} prompts continued greedily by {settings['continuation']} bytes; a loop: the last "
        f"{REPEATED} repeat with a period of at most {PERIOD}.\nM(X): mean of ‖h_t − h_(t−1)‖ / ‖h_(t−1)‖. Shift-FFN "
        "(arXiv 2505.17153) is made for models that are already trained.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    names = values_of(done, "model")
    rates = {name: np.mean([one["loops"] for one in _last(done, name)]) for name in names}
    bits = {name: np.mean([one["bits"] for one in _last(done, name)]) for name in names}
    text = "Bits a byte and greedy continuations that loop: "
    text += ", ".join(f"{n} {bits[n]:.2f} and {rates[n]:.2f}" for n in names)
    found = correlation(done)
    return text if found is None else f"{text}; correlation of the loop rate with M(X) {found:+.2f}"


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="half an hour on one busy core, four models; --quick: a minute of processor time, four models",
)
