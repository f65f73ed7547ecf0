"""A run's model with fewer layers, as the folder of a new run:

    python -m deltaformer_jax.prune --workdir DIR --layers N --out DIR2 [--metric bi] [--data PATH] [--step N]
                                    [--batches N]
    python -m deltaformer_jax.prune --workdir DIR

The N layers that --metric says can be spared first are removed at once. Without --layers nothing is written: the
measures of each layer are printed. They are taken on the evaluation split of the run's data, or of --data as in
`evaluate`. DIR2 has one checkpoint, of step 0, with a new optimiser: `sample` and `evaluate` read it, and
`train --workdir DIR2` goes on training it. A table goes to stderr, one line of JSON to stdout. Wrong input gives one
line on stderr and exit code 2.

--metric bi                  Block Influence: 1 - the mean cosine of the residual stream before and after a layer
         relative_magnitude  what the layer adds, beside the length of the stream after it
         loss                the loss of the model without this layer alone; takes as many forward passes as layers
         reverse, sequential from the last layer on, or from the first

Source: Men et al., "ShortGPT", arXiv 2403.03853. Its code takes the last layer's output after the final norm; here it
is the stream itself.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from pathlib import Path

from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.host.columns import right_aligned
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.waiting import say_aside, waiting

METRICS = ("bi", "relative_magnitude", "loss", "reverse", "sequential")
BATCHES = 8


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.prune", description="A run's model with fewer layers, as a new run."
    )
    parser.add_argument("--workdir", type=expand, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--layers", type=int, metavar="N", help="how many to remove (default: only measure)")
    parser.add_argument("--out", type=expand, metavar="DIR2", help="the new run's folder")
    parser.add_argument("--metric", choices=METRICS, default="bi", help="the order of removal (default: bi)")
    parser.add_argument(
        "--data", type=expand, metavar="PATH", help="what to measure on, as in evaluate (default: the run's data)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint to use (default: the newest)")
    parser.add_argument(
        "--batches", type=int, default=BATCHES, metavar="N", help=f"batches to measure on (default: {BATCHES})"
    )
    flags = parser.parse_args(arguments)
    with one_line_errors("deltaformer_jax.prune"), tempfile.TemporaryDirectory() as folder:
        saved = Saved.read(epath.Path(flags.workdir))  # a wrong folder is said before jax is imported
        _check(flags, saved.config.model.num_layers)
        print(json.dumps(prune(flags, saved, Path(folder))))


def _check(flags, layers: int) -> None:
    if (flags.layers is None) != (flags.out is None):
        raise ValueError("--layers N and --out DIR2: give both, or neither to measure the layers")
    if flags.layers is not None and not 0 < flags.layers < layers:
        raise ValueError(f"--layers {flags.layers}: the model has {layers} layers; give 1 to {layers - 1}")
    if flags.batches < 1:
        raise ValueError(f"--batches {flags.batches}: give 1 or more")


def prune(flags, saved: Saved, folder: Path) -> dict:
    """What is printed: the measures, and if layers are removed their numbers and the loss before and after."""
    with waiting("importing jax", say_aside):
        import numpy as np

        from deltaformer_jax.data import batches
        from deltaformer_jax.evaluate.corpus import evaluation_corpus
        from deltaformer_jax.model_parts import merge
        from deltaformer_jax.surgery import losses, measure, ranking
        from deltaformer_jax.surgery.rankings import MEASURED
        from deltaformer_jax.training.checkpoints.new_run import check_new
        from deltaformer_jax.training.checkpoints.restore import restore

    if flags.out is not None:
        check_new("--out", epath.Path(flags.out))
    with waiting(f"restoring the model of {flags.workdir}", say_aside):
        run = restore(flags.workdir, flags.step, say_aside)
    with waiting("reading the data", say_aside):
        corpus = evaluation_corpus(run, flags.data, folder)
    data = run.config.data
    rows = batches(corpus, "eval", sequence_length=data.sequence_length, batch_size=data.batch_size, seed=0)
    taken = list(itertools.islice(rows, flags.batches))
    model, layers = merge(run.program.parts, run.params), run.config.model.num_layers
    names = [name for name in MEASURED if name != "loss" or flags.metric == "loss"]
    with waiting("measuring the layers", say_aside):
        values = measure(model, taken, names)
    print(_table(values), file=sys.stderr)
    found = {"step": run.step, **{name: value.tolist() for name, value in values.items()}}
    if flags.layers is None:
        return found
    removed = sorted(ranking(values, flags.metric, layers)[: flags.layers])
    switches = np.ones((2, layers), bool)
    switches[1, removed] = False
    with waiting("measuring the pruned model", say_aside):
        before, after = losses(model, taken, switches).tolist()
    _write(flags, saved, run, removed)
    say_aside(f"without layers {', '.join(map(str, removed))}: loss {before:.4f} -> {after:.4f}, in {flags.out}")
    return found | {"removed": removed, "metric": flags.metric, "loss_before": before, "loss_after": after}


def _write(flags, saved: Saved, run, removed: list[int]) -> None:
    from deltaformer_jax.surgery import remove_layers
    from deltaformer_jax.surgery.new_run import model_of, write_changed

    write_changed(flags.out, flags.workdir, saved, run, *remove_layers(model_of(saved, run), run.params, removed))


def _table(values) -> str:
    """A line for each layer, with its measures."""
    lines = [("layer", *values)]
    for layer, numbers in enumerate(zip(*values.values())):
        lines.append((str(layer), *(f"{number:.4f}" for number in numbers)))
    return right_aligned(lines)


if __name__ == "__main__":
    main()
