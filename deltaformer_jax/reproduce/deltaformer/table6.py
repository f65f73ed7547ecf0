"""Table 6: times of recurrent, parallel and chunked DeltaFormer on this machine, and their ratios in one process.

In every round each implementation is run twice and its second run is timed. A ratio is the median over rounds of an
implementation's time divided by the chunked implementation's time in the same round. On a GPU or a TPU its kernels are
timed too, and the shape is the paper's. The parallel implementation holds T × T matrices, and the backward pass of the
recurrent one holds T arrays of T × K; T is therefore limited for both. Source: Xu et al., DeltaFormer (NeurIPS 2025),
appendix E.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
import numpy as np

from deltaformer_jax.ops import delta_attention
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import new_figure

# The paper's times in ms, on an H100, for [B, T, H, K] = [2, 8192, 32, 128].
PAPER_MS = {"recurrent": 279.9, "parallel": 102.2, "chunked": 12.7}
# Largest B H T² for the parallel form, which holds a few arrays of that size: 2**28 float32 numbers are 1 GiB, which
# fits into a memory of 16 GB.
LONGEST_PARALLEL = {"cpu": 2**28, "gpu": 2**32, "tpu": 2**28}
LONGEST_RECURRENT_BACKWARD = 2**28  # largest B H T² K for the backward pass of the recurrent form

# jax.default_backend() -> the implementations that are kernels for that platform.
KERNELS = {"cpu": (), "gpu": ("triton",), "tpu": ("pallas_tpu",)}

FULL = dict(
    cpu=dict(batch=1, heads=4, width=64, lengths=(512, 1024, 2048, 4096), rounds=7, dtype="float32"),
    accelerator=dict(batch=2, heads=32, width=128, lengths=(1024, 2048, 4096, 8192), rounds=11, dtype="bfloat16"),
)
QUICK = dict(
    cpu=dict(batch=1, heads=4, width=64, lengths=(256, 512, 1024), rounds=3, dtype="float32"),
    accelerator=dict(batch=2, heads=32, width=128, lengths=(1024, 4096), rounds=5, dtype="bfloat16"),
)


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    platform = jax.default_backend()
    both = sizes or (QUICK if quick else FULL)
    chosen = both["cpu" if platform == "cpu" else "accelerator"]
    forms = ["recurrent", "parallel", "chunked", *KERNELS[platform]]
    shared = {name: chosen[name] for name in ("batch", "heads", "width", "rounds", "dtype")}
    return [
        {
            "label": f"T = {length}, {direction}",
            "direction": direction,
            "length": length,
            "platform": platform,
            "forms": [form for form in forms if _fits(form, chosen, length, direction, platform)],
            **shared,
        }
        for direction in ("forward", "forward and backward")
        for length in chosen["lengths"]
    ]


def _fits(form: str, sizes: dict[str, Any], length: int, direction: str, platform: str) -> bool:
    scores = sizes["batch"] * sizes["heads"] * length**2
    if form == "parallel":
        return scores <= LONGEST_PARALLEL[platform]
    return form != "recurrent" or direction == "forward" or scores * sizes["width"] <= LONGEST_RECURRENT_BACKWARD


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    del folder
    batch, length, heads, width = (settings[name] for name in ("batch", "length", "heads", "width"))
    rng = np.random.default_rng(0)
    draw = lambda *shape: jax.numpy.asarray(rng.standard_normal(shape), settings["dtype"])
    inputs = [draw(batch, length, heads, width) for _ in range(3)]
    beta = jax.nn.sigmoid(draw(batch, length, heads))
    programs, compiled = {}, {}
    for form in settings["forms"]:
        if stop.requested:
            return None
        start = time.perf_counter()
        programs[form] = jax.jit(_function(form, settings["direction"])).lower(*inputs, beta).compile()
        compiled[form] = time.perf_counter() - start
    times: dict[str, list[float]] = {form: [] for form in programs}
    for number in range(settings["rounds"]):
        for form, program in programs.items():
            if stop.requested:
                return None
            for _ in range(2):  # the second run is reported: the first is slowed down by what ran before it
                start = time.perf_counter()
                jax.block_until_ready(program(*inputs, beta))
                seconds = time.perf_counter() - start
            times[form].append(seconds)
        if number == 0:
            note("    " + ", ".join(f"{form} {1e3 * times[form][0]:.3g} ms" for form in times))
    chunked = times["chunked"]
    return {
        "ms": {form: 1e3 * statistics.median(seconds) for form, seconds in times.items()},
        "over_chunked": {
            form: statistics.median(a / b for a, b in zip(seconds, chunked)) for form, seconds in times.items()
        },
        "temporaries_mb": {
            form: program.memory_analysis().temp_size_in_bytes / 1e6 for form, program in programs.items()
        },
        "compile_seconds": compiled,
    }


def _function(form: str, direction: str):
    call = lambda q, k, v, beta: delta_attention(q, k, v, beta=beta, implementation=form)
    if direction == "forward":
        return call
    total = lambda *inputs: call(*inputs).astype("float32").sum()
    return jax.grad(total, argnums=(0, 1, 2, 3))


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for record in done:
        settings, result = record["settings"], record["result"]
        paper = settings["direction"] == "forward" and settings["length"] == 8192
        for form, milliseconds in result["ms"].items():
            lines.append(
                {
                    "direction": settings["direction"],
                    "T": settings["length"],
                    "form": form,
                    "ms": f"{milliseconds:.3g}",
                    "over chunked": f"{result['over_chunked'][form]:.3g}",
                    "temporaries MB": f"{result['temporaries_mb'][form]:.3g}",
                    "the paper's ms": PAPER_MS.get(form, "") if paper else "",
                }
            )
    return lines


def figure(done: list[dict[str, Any]]):
    picture = new_figure(11, 4.5)
    directions = list(dict.fromkeys(record["settings"]["direction"] for record in done))
    panels = picture.subplots(1, len(directions), squeeze=False)[0]
    for panel, direction in zip(panels, directions):
        here = [record for record in done if record["settings"]["direction"] == direction]
        forms = list(dict.fromkeys(form for record in here for form in record["result"]["ms"]))
        for place, form in enumerate(forms):
            points = [
                (r["settings"]["length"], r["result"]["over_chunked"][form]) for r in here if form in r["result"]["ms"]
            ]
            panel.plot(*zip(*points), "o-", color=f"C{place}", label=form)
            if form in PAPER_MS and direction == "forward":
                ratio = PAPER_MS[form] / PAPER_MS["chunked"]
                label = "the paper's, H100" if place == 0 else None
                panel.plot(8192, ratio, "x", color=f"C{place}", markersize=8, label=label)
        panel.set(
            xlabel="T (tokens)",
            ylabel="time over that of the chunked form",
            xscale="log",
            yscale="log",
            title=direction,
        )
        panel.legend(fontsize=8)
    settings = done[0]["settings"]
    shape = f"[{settings['batch']}, T, {settings['heads']}, {settings['width']}] {settings['dtype']}"
    picture.suptitle(f"delta_attention, {shape}, {settings['platform']}")
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="four minutes on two busy cores; --quick: a minute and a half",
)
