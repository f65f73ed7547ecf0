"""One decoded token against a plain read of what it has to read: the parameters and the caches, once each.

    uv run python benchmarks/decode.py [--config NAME] [--batch 1 32] [--capacity 2048 16384] [--gigabytes 4]
                                       [--weights bfloat16] [--json FILE]
    taskset -c 0,1 ...                                       on two cores

`ms` is the median time of a step of `generate`, which donates its caches: tokens in, tokens out, one for each row, with
caches that are nearly full. `read` is the median time in which the same process adds up the same bytes; it alternates
with the steps, so that what slows the machine down slows both. `ratio` is the median over rounds of the one over the
other: 1 would be a program that does nothing but read. `temporaries MB` is what the step allocates beside its arguments
and results: a copy of the caches would show in it. Cases of more than --gigabytes are left out, and said.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
from flax import nnx
from measure import machine, report

from deltaformer_jax import LanguageModel, ModelConfig
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.files import packaged_config
from deltaformer_jax.decoding.generate import decode_step, with_weights_in
from deltaformer_jax.training.dry_run import with_any_vocabulary

ROUNDS = 9
LEAST = 2 * ROUNDS + 8  # slots that the timed steps need
# Without --config: the attention mixers at a size that two cores decode in tens of milliseconds.
SIZES = dict(vocab_size=1024, d_model=512, num_layers=12, num_heads=8, num_kv_heads=8, head_dim=64, mlp_dim=1536)


def models(name: str | None) -> dict[str, ModelConfig]:
    if name:
        return {name: with_any_vocabulary(packaged_config(name)).model}
    return {
        mixer: ModelConfig(mixers=(mixer,), **SIZES) for mixer in ("delta_former", "softmax_attention", "delta_net")
    }


def bytes_of(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@jax.jit
def add_up(trees):
    """Reads every number once."""
    return sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(trees))


def seconds(function, *arguments):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start, result


class Case:
    """A decoding step, compiled; `measure` runs it."""

    def __init__(self, config: ModelConfig, batch: int, capacity: int, weights: str):
        self.batch, self.capacity, self.weights = batch, capacity, weights

        def parts():
            model = with_weights_in(LanguageModel(config, rngs=nnx.Rngs(0)), weights)
            return *nnx.split(model), model.init_cache(batch, capacity)

        self._parts = parts
        graphdef, params, cache = nnx.eval_shape(parts)
        token, key = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.random.key(0)
        step = decode_step.lower(graphdef, params, token, cache, key, 0, 0.0, None, top_k=0)
        self._program = step.compile()

    def measure(self) -> dict:
        _, params, cache = self._parts()
        # As after a prompt that leaves room for the steps below.
        cache = jax.tree.map(lambda x: x + (self.capacity - LEAST) if x.dtype == jnp.int32 else x + 0.01, cache)
        token, key = jnp.zeros(self.batch, jnp.int32), jax.random.key(0)
        run = lambda cache, position: self._program(params, token, cache, key, position, 0.0, None)
        held = bytes_of((params, cache))
        ratios, steps, reads = [], [], []
        for i in range(ROUNDS + 1):
            _, (_, cache) = seconds(run, cache, 2 * i)
            step, (_, cache) = seconds(run, cache, 2 * i + 1)
            seconds(add_up, (params, cache))
            read, _ = seconds(add_up, (params, cache))
            if i:
                ratios.append(step / read), steps.append(step), reads.append(read)
        return {
            "batch": self.batch,
            "capacity": self.capacity,
            "weights": self.weights,
            "GB": held / 1e9,
            "ms": 1e3 * statistics.median(steps),
            "read": 1e3 * statistics.median(reads),
            "ratio": statistics.median(ratios),
            "temporaries MB": self._program.memory_analysis().temp_size_in_bytes / 1e6,
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="a packaged config; without it three mixers of 12 layers, 8 heads of 64")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--capacity", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--weights", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--gigabytes", type=float, default=4.0, help="leave larger cases out")
    parser.add_argument("--json", help="also write the table here")
    flags = parser.parse_args()
    with one_line_errors("benchmarks/decode.py"):
        if min(flags.batch) < 1:
            raise ValueError(f"--batch {min(flags.batch)}: give 1 or more")
        if min(flags.capacity) < LEAST:
            raise ValueError(f"--capacity {min(flags.capacity)}: give {LEAST} or more, room for the timed steps")
        measure_all(flags)


def measure_all(flags: argparse.Namespace):
    rows = []
    for name, config in models(flags.config).items():
        for batch in flags.batch:
            for capacity in flags.capacity:
                shapes = jax.eval_shape(
                    lambda config=config, batch=batch, capacity=capacity: (
                        (model := LanguageModel(config, rngs=nnx.Rngs(0))),
                        model.init_cache(batch, capacity),
                    )
                )
                if bytes_of(shapes) > 1e9 * flags.gigabytes:
                    print(f"{name}, batch {batch}, capacity {capacity}: {bytes_of(shapes) / 1e9:.1f} GB, left out")
                    continue
                rows.append({"model": name, **Case(config, batch, capacity, flags.weights).measure()})
                print(rows[-1], flush=True)
    print(machine())
    report("one decoded token beside a plain read of the same bytes", rows, flags.json)


if __name__ == "__main__":
    main()
