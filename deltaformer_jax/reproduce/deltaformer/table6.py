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
from deltaformer_jax.plot.style import MARKERS, explain, line_styles, plain, reference
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import figure_legend, listed, new_figure, values_of

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
    from matplotlib.ticker import LogLocator

    picture = new_figure(12, 5)
    directions = values_of(done, "direction")
    forms = list(dict.fromkeys(form for record in done for form in record["result"]["ms"]))
    styles = line_styles(forms)
    lengths = sorted(values_of(done, "length"))
    for panel, direction in zip(picture.subplots(1, len(directions), squeeze=False, sharey=True)[0], directions):
        here = [record for record in done if record["settings"]["direction"] == direction]
        for place, form in enumerate(forms):
            timed = [r for r in here if form in r["result"]["ms"]]
            if not timed:
                continue
            points = [(r["settings"]["length"], r["result"]["over_chunked"][form]) for r in timed]
            mark = dict(marker=MARKERS[place], fillstyle="none", label=form)
            panel.plot(*zip(*points), **mark, **styles[form])
            for point in points if form != "chunked" else []:
                beside = dict(xytext=(0, -14 if point[1] < 1 else 6), textcoords="offset points", ha="center")
                panel.annotate(f"{point[1]:.1f}", point, color=styles[form]["color"], fontsize=8, **beside)
            if form in PAPER_MS and form != "chunked" and direction == "forward":
                reference(panel, PAPER_MS[form] / PAPER_MS["chunked"], _paper(form))
        panel.set(xlabel="sequence length T (tokens), and the time of the chunked form", xscale="log", yscale="log")
        chunked = {record["settings"]["length"]: f"\n{record['result']['ms']['chunked']:.3g} ms" for record in here}
        panel.set_xticks(lengths, [f"{length:,}{chunked.get(length, '')}" for length in lengths])
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.margins(x=0.12, y=0.12)
        plain(panel, direction)
    picture.axes[0].set_ylabel("time / time of the chunked form")
    figure_legend(picture)
    settings = done[0]["settings"]
    shape = f"[{settings['batch']}, T, {settings['heads']}, {settings['width']}] {settings['dtype']}"
    explain(
        picture,
        _finding(done),
        "The paper (Table 6), on an H100 at [B, T, H, K] = [2, 8192, 32, 128]: recurrent 279.9 ms, parallel 102.2 ms, "
        "chunked 12.7 ms; dotted lines: their ratios.\n"
        f"delta_attention on {settings['platform']}, {shape}. A point is the median over {settings['rounds']} rounds "
        "of the ratio of two times in one round. A form that needs too much memory is left out.",
    )
    return picture


def _paper(form: str) -> str:
    return f"the paper's\n{form}: {PAPER_MS[form] / PAPER_MS['chunked']:.1f}"


def _finding(done: list[dict[str, Any]]) -> str:
    """How much longer than the chunked form the others take in the longest forward pass."""
    last = max(done, key=lambda r: (r["settings"]["direction"] == "forward", r["settings"]["length"]))
    settings, times = last["settings"], last["result"]["over_chunked"]
    ratios = [f"the {form} form takes {ratio:.1f} times" for form, ratio in times.items() if form != "chunked"]
    where = f"{settings['direction']}, T = {settings['length']:,}, {settings['platform']}"
    if not ratios:
        return f"How long do other forms than the chunked take? ({where})"
    return f"{listed(ratios).capitalize()} as long as the chunked form ({where})"


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="four minutes on two busy cores; --quick: a minute and a half",
)
