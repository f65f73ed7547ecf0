"""A million bytes through a cache of 256 entries: loss by position of byte models that were trained on 256 bytes.

A model is trained on rows of 256 bytes of the standard library's text, and then reads its files one after the other as
one text, with its caches limited in different ways:

* separators: SepLLM's streaming cache, 4 first tokens, 32 separators (newline . ; :), 92 last tokens, at most 256;
* separators, folded: the same, but what is dropped of a segment goes into its separator (`ops.fold_segments`);
* first and last: 4 first and 124 last tokens, no separators, as in StreamingLLM;
* last: 128 last tokens;
* ring: each token sees the last 256, with the positions of the text (softmax attention);
* all: nothing is dropped, as long as that can be afforded;
* anew: no cache; each 128 bytes are predicted after the 128 before them, as a model without a cache would do it.

These models are not trained for streaming. Two more are trained with a window of 92, 4 first tokens and separators, and
read with a cache of the same sizes:

* own separators: the positions are those of the text. Nothing is changed by the cache but that of the separators behind
  the window only the last 32 stay;
* own separators, by places: entries are numbered by places;
* no separators, by places: the same, but none of the separators behind the window stays.

Source: Chen et al., "SepLLM", arXiv 2412.12094.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from deltaformer_jax.data import ByteTokenizer
from deltaformer_jax.data.sources.stdlib import stdlib_files
from deltaformer_jax.decoding.chosen.layers import Slots, empty_cache, resolved
from deltaformer_jax.decoding.chosen.rules import OF_BYTES, Streaming
from deltaformer_jax.decoding.chosen.streaming import entries, read_piece
from deltaformer_jax.model import LanguageModel, num_parameters
from deltaformer_jax.model_parts import merge
from deltaformer_jax.plot.style import explain, line_styles, plain
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.language.byte_models import prepared
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure

OWN, OWN_PLACES, NONE_PLACES = "own separators", "own separators, by places", "no separators, by places"
SEPARATORS, FOLDED, FIRST, LAST = "separators", "separators, folded", "first and last", "last"
RING, ALL, ANEW = "ring", "all", "anew"
FULL = dict(
    model=dict(d_model=64, num_layers=2, num_heads=2, head_dim=32, mlp_dim=160, sequence_length=256, batch_size=16),
    steps=300,
    rules={
        SEPARATORS: (4, 32, 92, 256),
        FOLDED: (4, 32, 92, 256),
        FIRST: (4, 0, 124, 256),
        LAST: (0, 0, 128, 256),
    },
    whole=1_000_000,  # bytes of SEPARATORS and ANEW
    part=65_536,  # of the others
    all=4096,
)
QUICK = dict(
    model=dict(d_model=32, num_layers=1, num_heads=1, head_dim=32, mlp_dim=64, sequence_length=64, batch_size=8),
    steps=60,
    rules={
        SEPARATORS: (2, 8, 22, 64),
        FOLDED: (2, 8, 22, 64),
        FIRST: (2, 0, 30, 64),
    },
    whole=8192,
    part=4096,
    all=1024,
)
MIXERS = {"softmax attention": "softmax_attention", "DeltaFormer": "delta_former"}
TRAINED = "{}, trained with separators"
EOT = 256


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)

    def cell(name, mixer, **others):
        return {
            "label": name,
            "mixers": [mixer],
            **sizes["model"],
            "steps": sizes["steps"],
            "learning_rate": 4e-3,
            "seed": 0,
            "eval_batches": 8,
            "rules": {policy: list(rule) for policy, rule in sizes["rules"].items()},
            **{name: sizes[name] for name in ("whole", "part", "all")},
            **others,
        }

    own = sizes["rules"][SEPARATORS]
    fields = {"initial_tokens": own[0], "window": own[2], "separators": OF_BYTES}
    rules = {OWN: list(own), NONE_PLACES: [own[0], 0, *own[2:]], OWN_PLACES: list(own)}
    trained = dict(fields=fields, rules=rules, whole=sizes["part"])
    return [cell(name, mixer) for name, mixer in MIXERS.items()] + [
        cell(TRAINED.format(name), mixer, **trained) for name, mixer in MIXERS.items()
    ]


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    from deltaformer_jax.training.loop import train

    run, position, state = prepared(settings, folder, note)
    ending = train(run, position, state, stop, quiet=True)
    if not ending.finished:
        return None
    last = [record for record in run.metrics.records if "eval_bits_per_byte" in record][-1]
    read = _readings(settings, merge(run.program.parts, ending.state.params), note, stop)
    if read is None:
        return None
    return {
        "readings": read,
        "eval_bits": last["eval_bits_per_byte"],
        "parameters": num_parameters(ending.state.params),
        "trained_on": settings["steps"] * settings["sequence_length"] * settings["batch_size"],
    }


def policies(settings: dict[str, Any]) -> list[str]:
    """What a cell's model reads with, in order."""
    plain_caches = [] if "fields" in settings else [ALL]
    if plain_caches and settings["mixers"] == ["softmax_attention"]:
        plain_caches.append(RING)
    return [*settings["rules"], *plain_caches, ANEW]


def edges(length: int, first: int) -> list[int]:
    """Bounds of the stretches of a text that are reported apart: 0, first, 4 first, 16 first, … length."""
    found = [0, first]
    while found[-1] * 4 < length:
        found.append(found[-1] * 4)
    return [*found, length] if found[-1] < length else found


def long_text(length: int) -> np.ndarray:
    """int32 [length + 1]: end-of-text, and the standard library's files, one after the other."""
    parts, total = [], 0
    for file in stdlib_files()[0]:
        parts.append(np.frombuffer(file.read_bytes(), np.uint8))
        total += len(parts[-1])
        if total >= length:
            break
    return np.concatenate([[EOT], *parts])[: length + 1].astype(np.int32)


def _readings(settings: dict[str, Any], model: LanguageModel, note, stop) -> dict[str, Any] | None:
    """Policy -> bits a byte of each stretch, their bounds, and of the cache the mean and most entries and the bytes."""
    text, first, found = long_text(settings["whole"]), settings["sequence_length"], {}
    graphdef, params = nnx.split(model)
    plain_cache = {ALL: (None, settings["all"]), RING: (first, settings["part"])}
    for policy in policies(settings):
        if stop.requested:
            return None
        if policy in settings["rules"]:
            named = {"fold": policy == FOLDED, "all_places": policy in (OWN_PLACES, NONE_PLACES)}
            rule = Streaming(*settings["rules"][policy], **named)
            rule = resolved(rule, model, ByteTokenizer(), EOT + 1)
            length = settings["whole"] if policy == SEPARATORS else settings["part"]
            nats, held, most, size = _streamed(graphdef, params, text[None, : length + 1], rule)
            held, most, size = float(held) / length, int(most), int(size)
        elif policy == ANEW:
            length, held, most, size = settings["whole"], None, None, None
            nats = _anew(graphdef, params, text, first)
        else:
            window, length = plain_cache[policy]
            nats, size = _whole(with_window(model, window), text[None, : length + 1], first // 2)
            size = int(size)
            held = most = window or length
        bounds = edges(length, first)
        sums = np.add.reduceat(np.asarray(nats, np.float64), bounds[:-1])
        bits = [round(float(x) / (b - a) / math.log(2), 4) for x, a, b in zip(sums, bounds, bounds[1:])]
        found[policy] = {"edges": bounds, "bits": bits, "mean_entries": held, "most_entries": most, "bytes": size}
        note(f"    {settings['label']}, {policy}: {bits} bits a byte")
    return found


def with_window(model: LanguageModel, window: int | None) -> LanguageModel:
    """The same model whose attention sees `window` tokens."""
    model = nnx.merge(*nnx.split(model))
    for block in model.blocks:
        if window is not None:
            block.mixer.window = window
    return model


def _nats(model, hidden, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(model.logits(hidden)), targets[..., None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnames=("graphdef", "rule"))
def _streamed(graphdef, params, text, rule: Streaming):
    """(the nats of each byte after the first [T], the sum over tokens of the entries there are, the most, the cache's
    bytes) of text [1, T + 1]."""
    model = nnx.merge(graphdef, params)
    given, length = text[:, :-1], text.shape[1] - 1
    caches = empty_cache(model, 1, Slots.of(rule, length), rule)

    def read(state):
        cursor, caches, nats, held, most = state
        hidden, count, caches = read_piece(model, given, jnp.int32([length]), cursor, caches, rule)
        place = jnp.arange(hidden.shape[1], dtype=jnp.int32)
        at = cursor[0] + place
        found = _nats(model, hidden[0], text[0, jnp.minimum(at + 1, length)])
        nats = nats.at[jnp.where(place < count[0], at, length)].set(found, mode="drop")
        now = entries(model, caches)[0]
        held += count[0] * now - count[0] * (count[0] - 1) // 2
        return cursor + count, caches, nats, held, jnp.maximum(most, now)

    start = (
        jnp.zeros(1, jnp.int32),
        caches,
        jnp.zeros(length, jnp.float32),
        jnp.int32(0),
        jnp.int32(0),
    )
    _, _, nats, held, most = jax.lax.while_loop(lambda state: state[0][0] < length, read, start)
    return nats, held, most, cache_bytes(caches)


def cache_bytes(caches) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def _whole(model, text, piece: int):
    """(nats [T], the cache's bytes) of text [1, T + 1] with the model's own caches, `piece` tokens at a time."""
    graphdef, params = nnx.split(model)
    return _in_pieces(graphdef, params, text, piece)


@functools.partial(jax.jit, static_argnames=("graphdef", "piece"))
def _in_pieces(graphdef, params, text, piece: int):
    model = nnx.merge(graphdef, params)
    length = text.shape[1] - 1
    caches = model.init_cache(1, length)

    def read(caches, rows):
        given, targets = rows
        hidden, caches = model.hidden(given[None], cache=caches)
        return caches, _nats(model, hidden[0], targets)

    rows = (text[0, :-1].reshape(-1, piece), text[0, 1:].reshape(-1, piece))
    _, nats = jax.lax.scan(read, caches, rows)
    return nats.reshape(-1), cache_bytes(caches)


def _anew(graphdef, params, text: np.ndarray, size: int) -> np.ndarray:
    """The nats of each byte after the first [T]: of rows of `size` tokens that begin every size / 2, their second
    halves, and the first row whole."""
    half, length = size // 2, len(text) - 1
    starts = np.arange(0, max(length - half, 1), half)
    nats = np.zeros(length + size, np.float32)
    for group in np.array_split(starts, -(-len(starts) // 64)):
        group = np.concatenate([group, np.full(64 - len(group), group[-1])])
        at = np.minimum(group[:, None] + np.arange(size + 1), length)
        found = np.asarray(_rows(graphdef, params, text[at]))
        for start, row in zip(group, found):
            skip = half if start else 0
            nats[start + skip : start + size] = row[skip:]
    return nats[:length]


@functools.partial(jax.jit, static_argnames="graphdef")
def _rows(graphdef, params, text):
    model = nnx.merge(graphdef, params)
    hidden, _ = model.hidden(text[:, :-1])
    return _nats(model, hidden, text[:, 1:])


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for record in done:
        for policy, read in record["result"]["readings"].items():
            line = {"model": record["settings"]["label"], "cache": policy}
            line |= {name_of(read["edges"], i): f"{bits:.3f}" for i, bits in enumerate(read["bits"])}
            line["entries"] = "" if read["mean_entries"] is None else f"{read['mean_entries']:.1f}"
            line["at most"] = "" if read["most_entries"] is None else f"{read['most_entries']:,}"
            line["bytes"] = "" if read["bytes"] is None else f"{read['bytes']:,}"
            lines.append(line)
    columns = dict.fromkeys(name for line in lines for name in line)
    last = [name for name in columns if name in ("entries", "at most", "bytes")]
    order = [name for name in columns if name not in last] + last
    return [{name: line.get(name, "") for name in order} for line in lines]


def name_of(bounds: list[int], i: int) -> str:
    return f"to {bounds[i + 1]:,}"


def figure(done: list[dict[str, Any]]):
    columns = min(len(done), 2)
    picture = new_figure(3 + 5.5 * columns, 1 + 3.8 * -(-len(done) // 2))
    names = list(dict.fromkeys(policy for record in done for policy in record["result"]["readings"]))
    styles = line_styles(names, [ANEW])
    panels = picture.subplots(-(-len(done) // 2), columns, squeeze=False, sharey=True).flat
    lowest = min(min(read["bits"]) for record in done for read in record["result"]["readings"].values())
    for panel, record in zip(panels, done):
        for policy, read in record["result"]["readings"].items():
            ends = read["edges"][1:]
            panel.plot(ends, np.minimum(read["bits"], 2 * lowest), marker="o", label=policy, **styles[policy])
        panel.set_xscale("log")
        panel.set_xlabel("bytes read, up to")
        panel.set_ylabel(f"bits a byte (cut at {2 * lowest:.1f})")
        plain(panel, record["settings"]["label"])
    figure_legend(picture)
    settings = done[0]["settings"]
    explain(
        picture,
        _finding(done),
        f"Byte models trained on rows of {settings['sequence_length']} bytes read {settings['whole']:,} bytes of the "
        "standard library as one text; each point is the mean since the point before.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    """How far the last stretch of the streaming cache lies above the model that begins anew."""
    parts = []
    for record in done:
        read = record["result"]["readings"]
        last = OWN_PLACES if "fields" in record["settings"] else SEPARATORS
        apart = read[last]["bits"][-1] - read[ANEW]["bits"][-1]
        parts.append(f"{apart:+.3f} bits a byte in {record['settings']['label']}")
        entries = read[last]["most_entries"]
    return f"The last stretch through {entries} entries, against beginning anew: " + ", ".join(parts)


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="about three minutes a model on one core, two of four a minute; --quick: a minute and a half in all",
)
