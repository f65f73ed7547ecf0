"""A training run that takes seconds: a corpus of two kilobytes and a model of two layers."""

import dataclasses
import json
import random
import types

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig
from deltaformer_jax.data import prepare_corpus
from deltaformer_jax.host.interruption import Interruption
from deltaformer_jax.training.checkpoints.checksums import check_checksums
from deltaformer_jax.training.checkpoints.store import Checkpoints
from deltaformer_jax.training.loop import train
from deltaformer_jax.training.setup import prepare

# What a run leaves in its folder.
FILES = {"checkpoints", "config.json", "metrics.jsonl", "time.jsonl", "tokenizer.json"}


def make_corpus(folder, words=("def", "return", "self", "import", "é", "for x in y:\n")):
    """The path of a prepared byte corpus of 60 documents of uneven lengths."""
    source = folder / "text"
    source.mkdir(parents=True)
    draw = random.Random(0)
    for i in range(60):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(3, 40)))
        (source / f"{i:02}.txt").write_text(f"{i} {text}", encoding="utf-8")
    return prepare_corpus(source, folder / "corpus", eval_fraction=0.2).path


def small_config(corpus, **fields) -> Config:
    """A config; fields: section__field=value. Uses the implementation that compiles fastest."""
    config = Config(
        model=ModelConfig(
            d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64, implementation="parallel"
        ),
        data=DataConfig(path=str(corpus), sequence_length=32, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=3, decay_steps=20),
        run=RunConfig(steps=12, log_every=1, eval_every=5, checkpoint_every=4, keep_checkpoints=3, sample_prompt=""),
    )
    for name, value in fields.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def run_training(config, workdir, stop=None, devices=1, passed=()):
    """Prepare and train on the first `devices` devices. Returns the fields of the Run and its last position and state.

    stop(steps): returns an object to use as the Interruption; `steps.made` is how many steps the run has made.
    passed: numbers of batches that the run leaves out.
    """
    run, position, state = prepare(config, workdir, devices=jax.devices()[:devices])
    position = position._replace(passed=tuple(sorted({*position.passed, *passed})))
    steps = Steps(run.train_step, position.step)
    run = dataclasses.replace(run, train_step=steps)
    ending = train(run, position, state, Interruption() if stop is None else stop(steps), quiet=True)
    return types.SimpleNamespace(**vars(run), **ending.position._asdict(), state=ending.state)


class Steps:
    """A training step that also counts: `made` is the number of batches that the newest state has seen."""

    def __init__(self, step, made):
        self._step, self.made = step, made

    def __call__(self, state, batch):
        state, metrics = self._step(state, batch)
        self.made = int(state.step)
        return state, metrics


def compile_once(folder):
    """Turns on the compilation cache, since tests prepare the same run many times. Yields once, then turns it off."""
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    jax.config.update("jax_compilation_cache_dir", None)
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


class StopAt:
    """An Interruption that is requested once the run has made `step` steps."""

    def __init__(self, steps, step):
        self._steps, self._step = steps, step

    @property
    def requested(self):
        return self._steps.made >= self._step


class DieAt(StopAt):
    """Raises ProcessDied at `step`, so that nothing more is saved."""

    @property
    def requested(self):
        if self._steps.made >= self._step:
            raise ProcessDied
        return False


class ProcessDied(Exception):
    pass


def last_checkpoint(workdir):
    """(position in the data, the bytes of all arrays of the state) of the last checkpoint."""
    checkpoints = Checkpoints(workdir / "checkpoints", keep=3)
    step = checkpoints.steps()[-1]
    check_checksums(checkpoints.path(step))
    record = checkpoints.run_record(step)
    whatever = checkpoints._ocp.args.Composite(state=checkpoints._ocp.args.StandardRestore())
    state = checkpoints._manager.restore(step, args=whatever)["state"]
    checkpoints.close()
    place = {name: record[name] for name in ("step", "next_batch", "passed", "streak")}
    return place, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def read_metrics(workdir, timeless=True):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    if timeless:
        for record in records:
            record.pop("tokens_per_second", None)
    return records


def read_metrics_of_a_torn_file(workdir):
    """The records of metrics.jsonl, without a last line that a full disk has cut short."""
    records = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
