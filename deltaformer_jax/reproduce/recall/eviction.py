"""Associative recall from a cache after one eviction: accuracy by the share of entries kept, for seven policies.

A model is trained on MQAR (`mqar.py`) and then answers from caches that have lost entries. A row is its pairs, then the
keys again. The pairs are read into the caches; in each layer entries are dropped; then the keys are asked for. Of n
entries k stay:

* window: the last k;
* random: k drawn evenly;
* accumulated: the k that the pairs' own tokens read most, as H2O does, in one step;
* queries: the k that the later keys, the proxies of NACL, read most (F of `ops.proxy_scores`);
* queries and random: k/2 of these, and k/2 drawn by softmax(F);
* queries, read and write: the k of F plus what DeltaFormer's write compares;
* queries, by head: in models of two heads, the k that the later keys read most with that head. There "queries" sums
  over both heads, and both keep the same.

Nothing is trained for eviction. Sources: Chen et al., NACL, arXiv 2408.03675; Zhang et al., H2O, arXiv 2306.14048.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from deltaformer_jax import ops
from deltaformer_jax.data.task_data import EVALUATION_SEED
from deltaformer_jax.decoding.chosen.layers import with_memories
from deltaformer_jax.plot.style import explain, line_styles, plain
from deltaformer_jax.reproduce import train_task
from deltaformer_jax.reproduce.experiment import Experiment
from deltaformer_jax.reproduce.pictures import figure_legend, new_figure
from deltaformer_jax.tasks import make_task

WINDOW, EVEN, ACCUMULATED = "window", "random", "accumulated"
QUERIES, DRAWN, WRITE = "queries", "queries and random", "queries, read and write"
BY_HEAD, TWO_HEADS = "queries, by head", ", two heads"
MODELS = {
    "softmax attention": {"mixers": ["softmax_attention"]},
    "DeltaFormer": {"mixers": ["delta_former"]},
}
FULL = dict(
    stages=((16, 4, 128, 0.9), (64, 16, 64, 0.95), (128, 32, 32, 0.99)),
    words=256,
    width=64,
    steps=800,
    rows=256,
    shares=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    fields={},
    heads=(1, 2),
)
# KV shifting finds the key before a value within some steps.
QUICK = dict(
    stages=((16, 4, 128, 0.99),),
    words=32,
    width=32,
    steps=250,
    rows=128,
    shares=(0.25, 0.5, 1.0),
    fields={"kv_shift": True},
    heads=(1,),
)


def cells(quick: bool, sizes: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    sizes = sizes or (QUICK if quick else FULL)
    lengths, pairs, batch, targets = (list(column) for column in zip(*sizes["stages"]))
    found = []
    for heads, (name, fields) in itertools.product(sizes["heads"], MODELS.items()):
        settings = train_task.settings_of(
            name + TWO_HEADS * (heads == 2),
            [f"task:mqar,vocabulary={sizes['words']},pairs={number}" for number in pairs],
            lengths,
            model={
                "d_model": sizes["width"],
                "num_layers": 2,
                "num_heads": heads,
                "num_kv_heads": heads,
                "head_dim": sizes["width"] // heads,
                "tie_embeddings": False,
                "chunk_size": min(64, lengths[-1]),
                **fields,
                **sizes["fields"],
            },
            learning_rate=3e-3,
            steps=sizes["steps"],
            batch_size=batch,
            eval_rows=128,
            eval_every=25,
            target=targets,
            patience=1,
        )
        found.append({**settings, "rows": sizes["rows"], "shares": list(sizes["shares"])})
    return found


def policies(name: str) -> list[str]:
    if name.endswith(TWO_HEADS):
        return [QUERIES, BY_HEAD]
    return [WINDOW, EVEN, ACCUMULATED, QUERIES, DRAWN, *([WRITE] if name == "DeltaFormer" else [])]


def run(settings: dict[str, Any], folder: epath.Path, note, stop) -> dict[str, Any] | None:
    return train_task.run(settings, folder, note, stop, measure=functools.partial(_measured, settings))


def _measured(settings: dict[str, Any], model: nnx.Module) -> dict[str, Any]:
    """{"evicted": {policy: the accuracy at each share}, "entries": the number of them that stay at each share}."""
    length = settings["lengths"][-1]
    task = make_task(settings["task"][-1], length)
    examples = task(EVALUATION_SEED, np.arange(settings["rows"]))
    seen = 2 * task.pairs
    rows = jnp.asarray(examples.tokens[:, :seen]), jnp.asarray(examples.tokens[:, seen:])
    asked, targets = examples.counted[:, seen:], examples.targets[:, seen:]
    graphdef, params = nnx.split(model)
    counts = [round(share * seen) for share in settings["shares"]]
    found = {}
    for policy in policies(settings["label"]):
        answers = [np.asarray(_answers(graphdef, params, policy, *rows, jnp.int32(count))) for count in counts]
        found[policy] = [round(float(np.mean((answer == targets)[asked])), 4) for answer in answers]
    return {"evicted": found, "entries": counts}


@functools.partial(jax.jit, static_argnames=("graphdef", "policy"))
def _answers(graphdef, params, policy: str, pairs, asking, count):
    """The likeliest token after each of `asking` [B, Q], from caches of `pairs` [B, n] that keep `count` entries."""
    model = nnx.merge(graphdef, params)
    rows, seen = pairs.shape
    whole = jnp.concatenate([pairs, asking], axis=1)
    _, streams = model.look(whole, lambda before, after, real: before)
    caches = model.init_cache(rows, whole.shape[1])
    _, caches = model.hidden(pairs, cache=caches)
    memories = []
    for layer in range(model.periods):
        block, memory = jax.tree.map(lambda x, layer=layer: x[layer], (model.blocks[0], caches[0].memory))
        keep = _kept(block, streams[layer], memory, policy, seen, count, layer)
        memories.append(ops.compact_cache(memory, keep))
    caches = with_memories(caches, [jax.tree.map(lambda *layers: jnp.stack(layers), *memories)])
    logits, _ = model(asking, cache=caches)
    return jnp.argmax(logits, axis=-1)


def _kept(block, stream, memory, policy: str, seen: int, count, layer: int):
    """bool [B, N]: what one layer keeps. stream [B, T, d_model]: its input, pairs and what is asked."""
    rows, slots = memory.key_by_head.shape[0], memory.capacity
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), layer), rows)
    none, half = jnp.zeros(rows, jnp.int32), jnp.full(rows, count // 2, jnp.int32)
    choose = lambda scores, drawn: ops.entries_by_row(
        scores, memory, jnp.full(rows, count, jnp.int32), drawn, keys, proxies=0
    )
    if policy == WINDOW:
        return choose(jnp.broadcast_to(jnp.arange(slots, dtype=jnp.float32), (rows, slots)), none)
    if policy == EVEN:
        return choose(jnp.zeros((rows, slots)), jnp.full(rows, count, jnp.int32))
    positions = jnp.broadcast_to(jnp.arange(stream.shape[1], dtype=jnp.int32), stream.shape[:2])
    compared = block.mixer.compared(block.mixer_norm(stream), segment_ids=jnp.ones_like(positions), positions=positions)
    if policy == ACCUMULATED:
        return choose(ops.proxy_scores(memory, compared["read"]["query"][:, :seen], scale=1.0), none)
    # For queries that come after all entries of the cache.
    later = memory.with_arrays(length=memory.length + stream.shape[1] - seen)
    scores = ops.proxy_scores(later, compared["read"]["query"][:, seen:], scale=1.0, by_head=policy == BY_HEAD)
    if policy == WRITE:
        scores += ops.proxy_scores(later, compared["write"]["query"][:, seen:], scale=1.0)
    return choose(scores, half if policy == DRAWN else none)


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "model": record["settings"]["label"],
            "kept by": policy,
            **{f"{share:.0%}": f"{x:.3f}" for share, x in zip(record["settings"]["shares"], accuracies)},
        }
        for record in done
        for policy, accuracies in record["result"]["evicted"].items()
    ]


def figure(done: list[dict[str, Any]]):
    lines, columns, panel = -(-len(done) // 2), min(len(done), 2), None
    picture = new_figure(3 + 5.5 * columns, 1 + 3.6 * lines)
    styles = line_styles([*policies("DeltaFormer"), BY_HEAD], [WINDOW])
    for place, record in enumerate(done, 1):
        panel = picture.add_subplot(lines, columns, place, sharey=panel)
        shares = [100 * share for share in record["settings"]["shares"]]
        for policy, accuracies in record["result"]["evicted"].items():
            panel.plot(shares, accuracies, marker="o", label=policy, **styles[policy])
        panel.set_xlabel("entries of the prompt that stay (%)")
        panel.set_ylabel("accuracy")
        plain(panel, record["settings"]["label"])
    figure_legend(picture)
    settings = done[0]["settings"]
    explain(
        picture,
        _finding(done),
        f"Accuracy of recall (MQAR) of {settings['model']['num_layers']} layers of width "
        f"{settings['model']['d_model']}, trained without eviction, from caches that keep some of the\n"
        f"{done[0]['result']['entries'][-1]} entries of the pairs in each layer. NACL reports averages over "
        "tasks of Llama models, which do not compare.",
    )
    return picture


def _finding(done: list[dict[str, Any]]) -> str:
    """What the queries as proxies and another policy keep of the accuracy, where about half of the entries stay."""
    parts = []
    single = [record for record in done if WINDOW in record["result"]["evicted"]]
    other, named = (WINDOW, "with a window") if single else (BY_HEAD, "by head")
    for record in single or done:
        found, shares = record["result"]["evicted"], record["settings"]["shares"]
        at = min(range(len(shares)), key=lambda i: abs(shares[i] - 0.5))
        parts.append(
            f"{record['settings']['label']} recalls {found[QUERIES][at]:.3f} with queries as proxies, "
            f"{found[other][at]:.3f} {named}"
        )
    return f"From {done[0]['settings']['shares'][at]:.0%} of its entries " + "; ".join(parts)


EXPERIMENT = Experiment(
    cells=cells,
    run=run,
    rows=rows,
    figure=figure,
    cost="about two minutes for each of four models on one core; --quick: a minute and a half in all, one head only",
)
