"""The four updates on the config `tiny`: bits per byte over seeds, each update at the best of some learning rates.

    python benchmarks/optimizers.py [--steps 200] [--seeds 3] [--names adamw muon lion adafactor]
                                    [--rates RATE ...] [--json FILE]

Each update trains with seed 0 at each of its RATES, or of --rates, for all steps. The rate with the fewest bits per
byte on the evaluation split then trains with the other seeds too. A run's schedule is as long as the run. One line per
run is printed as it ends, and a table at the end.

One program serves all rates of an update, since each of the four updates is proportional to the learning rate (weight
decay included): the program has the rate 1, and its state a factor.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from measure import machine

from deltaformer_jax.config import Config
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.files import packaged_config
from deltaformer_jax.data import Corpus, batches
from deltaformer_jax.sharding.mesh import batch_sharding, make_mesh
from deltaformer_jax.sharding.rows import to_devices
from deltaformer_jax.training.checkpoints.vocabulary import with_vocabulary
from deltaformer_jax.training.evaluation import evaluate
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.setup import load_data
from deltaformer_jax.training.state import TrainState, abstract_state

RATES = {
    "adamw": (2e-3, 4e-3, 8e-3),
    "muon": (4e-3, 8e-3, 1.6e-2),
    "lion": (2.5e-4, 5e-4, 1e-3),
    "adafactor": (1e-2, 2e-2, 4e-2),
}


class AnyRate(Program):
    """A Program whose learning rate, as a factor of its config's, is a number in the state."""

    def __init__(self, config: Config, mesh: Mesh):
        super().__init__(config, mesh)
        self._optimiser = optax.chain(self._optimiser, optax.inject_hyperparams(optax.scale)(step_size=1.0))
        self.abstract, self.shardings = abstract_state(self.parts, self._optimiser, mesh)

    def start(self, seed: int, rate: float) -> TrainState:
        state = self.create_state(seed)
        *others, factor = state.opt_state
        factor = factor._replace(hyperparams={"step_size": jnp.float32(rate)})
        return jax.device_put(state._replace(opt_state=(*others, factor)), self.shardings)


def settings(name: str, steps: int) -> Config:
    config = packaged_config("tiny")
    config.optimizer = dataclasses.replace(config.optimizer, name=name, learning_rate=1.0, decay_steps=steps)
    return config


def trained(program: AnyRate, config: Config, corpus: Corpus, seed: int, rate: float, steps: int) -> float:
    """Bits per byte after `steps` updates."""
    shape = dict(sequence_length=config.data.sequence_length, batch_size=config.data.batch_size)
    sharding, state = batch_sharding(program.mesh), program.start(seed, rate)
    step, stream = program.compile_train_step(config.data), batches(corpus, "train", seed=seed, **shape)
    for _ in range(steps):
        state, _ = step(state, to_devices(next(stream), sharding))
    skipped = int(state.guard.skipped)
    if skipped:
        print(f"  {skipped} of {steps} updates were skipped by the guard")
    result = evaluate(
        program.evaluation_step,
        state.params,
        batches(corpus, "eval", seed=0, **shape),
        token_bytes=corpus.tokenizer.token_bytes,
        sharding=sharding,
        limit=config.run.eval_batches,
    )
    return result.bits_per_byte


def one_run(
    name: str, program: AnyRate, config: Config, corpus: Corpus, steps: int, runs: list[dict], seed: int, rate: float
) -> float:
    """`trained`, printed and added to `runs`."""
    start = time.perf_counter()
    bits = trained(program, config, corpus, seed, rate, steps)
    seconds = time.perf_counter() - start
    print(f"{name} rate {rate:g} seed {seed}: {bits:.4f} bits per byte ({seconds:.0f} s)", flush=True)
    runs.append({"name": name, "rate": rate, "seed": seed, "bits_per_byte": bits, "seconds": seconds})
    return bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="updates of each run, and length of its schedule")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the best rate, with the seeds 0, 1, ...")
    parser.add_argument("--names", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--rates", nargs="+", type=float, help="the learning rates to try; default: RATES")
    parser.add_argument("--json", default="", help="file for the results of all runs")
    flags = parser.parse_args()
    corpus, rows, runs = load_data(settings("adamw", flags.steps)), [], []
    for name in flags.names:
        config = with_vocabulary(settings(name, flags.steps), corpus.tokenizer)
        program = AnyRate(config, make_mesh(config.mesh, jax.devices()[:1]))
        run = functools.partial(one_run, name, program, config, corpus, flags.steps, runs)
        first = {rate: run(0, rate) for rate in flags.rates or RATES[name]}
        best = min(first, key=first.get)
        found = [first[best], *(run(seed, best) for seed in range(1, flags.seeds))]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        rows.append((name, best, statistics.mean(found), spread, first))
    print("| update | learning rate | bits per byte | seed 0 at each rate |\n| --- | --- | --- | --- |")
    for name, best, mean, spread, first in rows:
        tried = ", ".join(f"{rate:g}: {bits:.3f}" for rate, bits in first.items())
        print(f"| {name} | {best:g} | {mean:.3f} ± {spread:.3f} | {tried} |")
    print(machine())
    if flags.json:
        kept = {"machine": machine(), "steps": flags.steps, "runs": runs}
        Path(flags.json).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors("benchmarks/optimizers.py"):
        main()
