"""What a run has learnt, in numbers that can be read by themselves:

    python -m deltaformer_jax.inspect --workdir DIR kv_shift [--step N]
    python -m deltaformer_jax.inspect --workdir DIR token_change [--step N] [--data PATH] [--batches N]

kv_shift: the scalars of KV shifting, k'_t = a₁ k_t + a₂ k_{t−1} and v'_t = b₁ v_t + b₂ v_{t−1}, of each layer and key
and value head. A table on stderr counts the signs of a₁ − a₂ and b₁ − b₂: a head of a₁ < a₂ and b₁ > b₂ reads the
token after a matching one, as an induction head does. Each head is counted once, so that the counts sum to the layers
with KV shifting times their key and value heads. One line of JSON on stdout has the counts and the scalars. A part that
model.kv_shift_parts leaves alone counts as (1, 0); of a window above two only the first two scalars are counted.

token_change: how much the residual stream changes from a token to the next behind each layer, the mean of
‖h_t − h_{t−1}‖ / ‖h_{t−1}‖, on the evaluation split of the run's data, or of --data as in `evaluate`. "M(X)" is the
mean over layers. A table of the layers goes to stderr, one line of JSON to stdout.

Nothing is written. Wrong input gives one line on stderr and exit code 2.

Source: Xu et al., "KV Shifting Attention Enhances Language Modeling", arXiv 2411.19574, Table 4; M(X): "Shift-FFN",
arXiv 2505.17153.
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
from deltaformer_jax.host.spelling import did_you_mean
from deltaformer_jax.host.waiting import say_aside, waiting

PARTS = ("kv_shift", "token_change")
BATCHES = 8


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m deltaformer_jax.inspect", description="What a run has learnt, in numbers.")
    parser.add_argument("part", nargs="?", metavar="PART", help=f"what to inspect: {', '.join(PARTS)}")
    parser.add_argument("--workdir", type=expand, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint to use (default: the newest)")
    parser.add_argument(
        "--data", type=expand, metavar="PATH", help="token_change: what to measure on (default: the run's data)"
    )
    parser.add_argument(
        "--batches", type=int, metavar="N", help=f"token_change: batches to measure on (default: {BATCHES})"
    )
    flags = parser.parse_args(arguments)
    with one_line_errors("deltaformer_jax.inspect"), tempfile.TemporaryDirectory() as folder:
        if flags.part not in PARTS:
            given = "no part" if flags.part is None else repr(flags.part)
            hint = did_you_mean(flags.part or "", PARTS)
            raise ValueError(f"{given}: give what to inspect, one of {', '.join(PARTS)}{hint}")
        Saved.read(epath.Path(flags.workdir))  # a wrong folder is said before jax is imported
        if flags.part == "token_change":
            print(json.dumps(inspect_token_change(flags, Path(folder))))
            return
        for name in ("data", "batches"):
            if getattr(flags, name) is not None:
                raise ValueError(f"--{name}: {flags.part} is read from the parameters alone; leave --{name} out")
        print(json.dumps(inspect_kv_shift(flags.workdir, flags.step)))


def inspect_token_change(flags, folder: Path) -> dict:
    """What is printed. Raises ValueError, naming the flag, for data that cannot be read or no batch."""
    batches = BATCHES if flags.batches is None else flags.batches
    if batches < 1:
        raise ValueError(f"--batches {batches}: give 1 or more")
    with waiting("importing jax", say_aside):
        from deltaformer_jax.data import batches as batches_of
        from deltaformer_jax.evaluate.corpus import evaluation_corpus
        from deltaformer_jax.model_parts import merge
        from deltaformer_jax.surgery import token_change
        from deltaformer_jax.training.checkpoints.restore import restore

    with waiting(f"restoring the model of {flags.workdir}", say_aside):
        run = restore(flags.workdir, flags.step, say_aside)
    with waiting("reading the data", say_aside):
        corpus = evaluation_corpus(run, flags.data, folder)
    sizes = dict(sequence_length=run.config.data.sequence_length, batch_size=run.config.data.batch_size)
    taken = itertools.islice(batches_of(corpus, "eval", **sizes, seed=0), batches)
    with waiting("measuring the layers", say_aside):
        change = token_change(merge(run.program.parts, run.params), taken)
    lines = [("layer", "M"), *((str(layer), f"{value:.4f}") for layer, value in enumerate(change))]
    print(right_aligned(lines), file=sys.stderr)
    return {"step": run.step, "M(X)": float(change.mean()), "by_layer": change.tolist()}


def inspect_kv_shift(workdir: str, step: int | None = None) -> dict:
    """What is printed. Raises ValueError, naming the folder, for a run without KV shifting."""
    with waiting("importing jax", say_aside):
        from deltaformer_jax.model_parts import merge
        from deltaformer_jax.surgery.shift_scalars import kv_shift_heads, signs
        from deltaformer_jax.training.checkpoints.restore import restore

    with waiting(f"restoring the model of {workdir}", say_aside):
        run = restore(workdir, step, say_aside)
    heads = kv_shift_heads(merge(run.program.parts, run.params))
    if not heads:
        raise ValueError(
            f"--workdir {workdir}: no layer of its model shifts keys or values; train one with model.kv_shift=True"
        )
    counts = signs(heads)
    print(_table(counts), file=sys.stderr)
    return {"step": run.step, "kv_shift": counts, "heads": heads}


def _table(counts: dict[str, int]) -> str:
    lines = [("", "b1 > b2", "b1 <= b2")]
    for name, sign in (("a1 > a2", "+"), ("a1 <= a2", "-")):
        lines.append((name, *(str(counts[f"key {sign} value {value}"]) for value in "+-")))
    return right_aligned(lines)


if __name__ == "__main__":
    main()
