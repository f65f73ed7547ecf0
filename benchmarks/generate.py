"""Continuing many prompts: rows that are refilled when their text ends, against batches that run until all have ended.

    uv run python benchmarks/generate.py [--prompts 1000] [--batch_size 32] [--json FILE]
    taskset -c 0,1 ...                                       on two cores

The model is tiny, and its texts are of uneven lengths: the most tokens of each is drawn from a geometric distribution
of mean 16, cut at 64, as texts that end by themselves are. Prompts have 2 to 32 tokens. `refilled` is one call of
`decoding.generate` with all prompts; `in batches` is one call for every batch_size prompts. Both draw the same tokens,
which is checked. Rounds alternate; `tokens/s` counts drawn tokens in the median round, `ratio` is the median over
rounds of the times' ratio. `steps` are the calls of the decoding step, of batch_size rows each.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
from flax import nnx
from measure import machine, report

from deltaformer_jax import LanguageModel, ModelConfig
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.decoding import continuous, generate

ROUNDS = 2
SIZES = dict(vocab_size=512, d_model=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, mlp_dim=256)
MEAN, MOST = 16, 64


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--json", help="also write the table here")
    flags = parser.parse_args()
    with one_line_errors("benchmarks/generate.py"):
        if not 1 <= flags.batch_size <= flags.prompts:
            raise ValueError(f"--batch_size {flags.batch_size}: give 1 to the number of prompts, {flags.prompts}")
        measure(flags)


def measure(flags: argparse.Namespace) -> None:
    model = LanguageModel(ModelConfig(mixers=("delta_former",), **SIZES), rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 512, length).tolist() for length in draw.integers(2, 33, flags.prompts)]
    limits = np.minimum(draw.geometric(1 / MEAN, flags.prompts), MOST).tolist()
    seeds = list(range(flags.prompts))

    def run(places):
        return generate(
            model,
            [prompts[i] for i in places],
            max_tokens=[limits[i] for i in places],
            seed=[seeds[i] for i in places],
            batch_size=flags.batch_size,
        )

    def in_batches():
        whole = range(0, flags.prompts, flags.batch_size)
        return [text for start in whole for text in run(range(start, min(start + flags.batch_size, flags.prompts)))]

    ways = {"refilled": lambda: run(range(flags.prompts)), "in batches": in_batches}
    times, texts, steps = {way: [] for way in ways}, {}, {}
    advance = continuous._Batch.advance
    count = [0]

    def counted(batch):
        count[0] += any(batch._in_row)
        advance(batch)

    continuous._Batch.advance = counted
    for _ in range(ROUNDS + 1):  # the first compiles
        for way, call in ways.items():
            count[0], start = 0, time.perf_counter()
            texts[way] = call()
            times[way].append(time.perf_counter() - start)
            steps[way] = count[0]
    same = sum(a.tokens == b.tokens for a, b in zip(*texts.values()))
    tokens = sum(limits)
    rows = [
        {
            "way": way,
            "tokens": tokens,
            "steps": steps[way],
            "rows at work": (tokens - flags.prompts) / (steps[way] * flags.batch_size),
            "seconds": statistics.median(times[way][1:]),
            "tokens/s": tokens / statistics.median(times[way][1:]),
            "ratio": statistics.median(b / a for a, b in zip(times["refilled"][1:], times[way][1:])),
        }
        for way in ways
    ]
    print(machine())
    print(f"{same} of {flags.prompts} texts are the same both ways")
    report(f"continuing {flags.prompts} prompts in {flags.batch_size} rows", rows, flags.json)


if __name__ == "__main__":
    main()
