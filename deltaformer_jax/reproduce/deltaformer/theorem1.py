"""Theorem 1: a memory of n slots whose contents are swapped by writing differences of keys; exact if κ rounds.

The n keys are nearly orthogonal vectors in K dimensions. Random swaps are written by `delta_attention` with its cache
in float64, and all slots are read about 8 times on the way. With compression the cache is rebuilt every n swaps from
the contents of the slots. The error is the largest entry of |read − expected|. Source: Xu et al., DeltaFormer (NeurIPS
2025), Theorem 1 and appendix C.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaformer_jax.ops import KUCache, Round, compress_cache, delta_attention
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import new_figure
from deltaformer_jax.tasks import SwapConstruction, coherence, near_orthogonal_keys

FULL = dict(width=128, slots=(64, 128, 256, 512), swaps=4000)
QUICK = dict(width=64, slots=(32, 64, 128), swaps=500)

# The paper's "round" keeps two decimals; the proof of Theorem 1 needs rounding to integers.
SIMILARITIES = {"round to integers": Round(decimals=0), "round to 2 decimals": Round(decimals=2), "linear": "linear"}
VALUE_WIDTH = 16
READS = 8  # how often all slots are read during the swaps


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    return [
        {
            "label": f"{name}, n = {slots}{', compressed' if compressed else ''}",
            "similarity": name,
            "slots": slots,
            "width": sizes["width"],
            "value_width": VALUE_WIDTH,
            "swaps": sizes["swaps"],
            "compressed_every": slots if compressed else 0,
            "dtype": "float64",
            "seed": 0,
        }
        for name in SIMILARITIES
        for slots in sizes["slots"]
        for compressed in (False, True)
    ]


def run(settings: dict[str, Any], folder, note, stop) -> dict[str, Any] | None:
    del folder, note
    with jax.enable_x64(True):
        return _run(settings, stop)


def _run(settings: dict[str, Any], stop) -> dict[str, Any] | None:
    slots, swaps, every = settings["slots"], settings["swaps"], settings["compressed_every"]
    keys = near_orthogonal_keys(slots, settings["width"])
    values = np.random.default_rng(settings["seed"]).standard_normal((slots, settings["value_width"]))
    made = SwapConstruction(keys, values, swaps)(settings["seed"], np.arange(1))
    similarity = SIMILARITIES[settings["similarity"]]
    options = dict(write_similarity=similarity, read_similarity=similarity, write_scale=1.0, read_scale=1.0)

    # Every call has the same number of tokens, so that few programs are compiled. With compression the cache has room
    # for the slots and for the tokens written before it is rebuilt.
    block = min(slots, max(1, swaps // READS))
    capacity = slots + (slots + block if every else swaps + block)

    @jax.jit
    def write(cache, key, value, gate):
        arrays = (x[None, :, None] for x in (key, key, value))
        gate = gate[None, :, None]
        return delta_attention(*arrays, alpha=gate, beta=gate, cache=cache, return_cache=True, **options)[1]

    @jax.jit
    def contents(cache):
        """(a cache rebuilt from the contents of all slots, these contents)."""
        read = compress_cache(cache, slot_keys, read_similarity=similarity, read_scale=1.0)
        return read, read.value[0, :slots, 0]

    slot_keys = jnp.asarray(keys)[:, None]
    cache = KUCache.empty(1, capacity, 1, 1, settings["width"], settings["value_width"], jnp.float64)
    cache = write(cache, made.keys[0, :slots], made.values[0, :slots], made.gate[0, :slots])
    holds, curve, largest, since, read_every = np.arange(slots), [], slots, 0, max(block, swaps // READS)
    curve.append([0, _error(contents(cache)[1], values)])
    for first in range(0, swaps, block):
        if stop.requested:
            return None
        here = slice(slots + first, slots + min(first + block, swaps))
        if every and since + block > every:
            cache, since = contents(cache)[0], 0
        cache = write(cache, made.keys[0, here], made.values[0, here], made.gate[0, here])
        done = min(first + block, swaps)
        since += done - first
        largest = max(largest, int(cache.length[0]))
        for a, b in made.pairs[0, first:done]:
            holds[[a, b]] = holds[[b, a]]
        if done == swaps or done // read_every > first // read_every:
            curve.append([done, _error(contents(cache)[1], values[holds])])
    np.testing.assert_array_equal(values[holds], made.expected[0])
    return {"error": curve[-1][1], "curve": curve, "entries": largest, "coherence": coherence(keys)}


def _error(read, expected: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(read) - expected)))


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "similarity": record["settings"]["similarity"],
            "slots n": record["settings"]["slots"],
            "width K": record["settings"]["width"],
            "max |k·k'|": f"{record['result']['coherence']:.3f}",
            "swaps": record["settings"]["swaps"],
            "cache": "compressed" if record["settings"]["compressed_every"] else "whole",
            "entries": record["result"]["entries"],
            "error": f"{record['result']['error']:.1e}",
        }
        for record in done
    ]


def figure(done: list[dict[str, Any]]):
    picture = new_figure(13, 4.6)
    panels = picture.subplots(1, len(SIMILARITIES), sharey=True)
    slots = list(dict.fromkeys(record["settings"]["slots"] for record in done))
    for panel, name in zip(panels, SIMILARITIES):
        for record in done:
            settings = record["settings"]
            if settings["similarity"] != name:
                continue
            swaps, errors = np.array(record["result"]["curve"]).T
            compressed = bool(settings["compressed_every"])
            panel.plot(
                swaps,
                np.maximum(errors, 1e-17),
                ":o" if compressed else "-",
                markersize=3,
                color=f"C{slots.index(settings['slots'])}",
                label=f"n = {settings['slots']}{', compressed' if compressed else ''}",
            )
        panel.set(title=name, xlabel="swaps", yscale="log")
    panels[0].set_ylabel("largest error of a read (float64)")
    panels[-1].legend(fontsize=7)
    picture.suptitle(f"{VALUE_WIDTH} values a slot, keys of width K = {done[0]['settings']['width']}")
    return picture


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="two and a half minutes on two busy cores; --quick: a minute",
)
