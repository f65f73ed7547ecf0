"""README.md of an exported run: what the model is, what it was trained on and how, what it began from, its scores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from etils import epath

from deltaformer_jax.config import Config, Mixer
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data.mixture import parts_of_mixture
from deltaformer_jax.interop.kept import source_of_run
from deltaformer_jax.training.checkpoints.restore import Restored

TASKS_FILE = "tasks.json"
_FOREBEARS = 10  # runs that began from one another


def model_card(run: Restored, workdir: epath.PathLike) -> str:
    """The card. What cannot be found any more, such as a corpus that was removed, is said by its path alone."""
    workdir = epath.Path(workdir)
    config, model = Saved.read(workdir).config, run.config.model
    source = source_of_run(workdir)
    mixers = ", ".join(dict.fromkeys(m if isinstance(m, str) else m.name for m in model.mixers))
    lines = [
        "---",
        "tags: [deltaformer_jax]",
        "---",
        "",
        f"# A language model {'converted' if source else 'trained'} with deltaformer_jax",
        "",
        f"- Model: {model.num_layers} layers of width {model.d_model}, {mixers}; {model.vocab_size} tokens.",
        *_base(config, source),
        *_data(config, source),
    ]
    if source is None:
        lines.append(
            f"- Training: {run.step} steps of {config.data.batch_size} rows of {config.data.sequence_length} tokens, "
            f"seed {config.run.seed}, by {config.optimizer.name}."
        )
    lines += [f"- Evaluation on held-out data: {_evaluation(workdir, run.step)}.", *_written(source), ""]
    lines += [*_tasks(workdir), *([] if source else _command(config))]
    return "\n".join(lines)


def _written(source: str | None) -> Iterator[str]:
    program = "python -m deltaformer_jax.convert"
    read = f"`{program} {source} --workdir DIR`, then " if source else ""
    yield f"- Written by: {read}`{program} --to-hf --workdir DIR --out FOLDER`."


def _base(config: Config, source: str | None) -> Iterator[str]:
    """What the parameters began from, and what that began from."""
    optimizer, begun = config.optimizer, source or config.run.init_from
    if not begun:
        yield "- Base model: none; the parameters were drawn."
        return
    line = f"- Base model: {'; that from '.join(_forebears(begun))}."
    if source:
        line += " Its parameters were not trained further here."
    elif not optimizer.lora_rank:
        line += " All parameters were trained further."
    yield line
    if optimizer.lora_rank:
        kernels = ", ".join(f"`{name}`" for name in optimizer.lora_kernels)
        yield (
            f"- LoRA: rank {optimizer.lora_rank}, alpha {optimizer.lora_alpha:g}, on the kernels {kernels}; the change "
            "is added to the kernels in these files. All else is the base model's."
        )


def _forebears(begun: str) -> Iterator[str]:
    for _ in range(_FOREBEARS):
        yield f"`{begun}`"
        try:
            folder = epath.Path(begun)
            begun = source_of_run(folder) or Saved.read(folder).config.run.init_from
        except (ValueError, OSError):  # a folder of weights, or one that is no longer there
            return
        if not begun:
            return


def _data(config: Config, source: str | None) -> Iterator[str]:
    if source:
        yield "- Training data: that of the base model; its folder does not say which."
        return
    yield f"- Training data: {f'`{config.data.path}`' if config.data.path else 'the standard library of Python'}."
    for path in parts_of_mixture(config.data.path):
        try:
            manifest = json.loads((epath.Path(path) / "manifest.json").read_text())
            said, train = manifest["settings"]["source"], manifest["splits"]["train"]
        except (ValueError, KeyError, OSError):  # a task, or a corpus that is no longer there
            continue
        part = "".join(f", {name} {said[name]}" for name in ("subset", "split") if name in said)
        talks = ", conversations" if "chat" in manifest["settings"] else ""
        yield (
            f"  - `{path}`: of `{said.get('path', said['kind'])}`{part}{talks}; {train['documents']:,} documents, "
            f"{train['tokens']:,} tokens."
        )


def _evaluation(workdir: epath.Path, step: int) -> str:
    metrics = workdir / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    found = [record for record in records if "eval_loss" in record and record["step"] <= step]
    if not found:
        return "none"
    last = found[-1]
    score = f"loss {last['eval_loss']:.4f}"
    if "eval_accuracy" in last:
        score += f", accuracy {last['eval_accuracy']:.4f}"
    if "eval_bits_per_byte" in last:
        score += f", {last['eval_bits_per_byte']:.4f} bits per byte"
    return f"{score}, at step {last['step']}"


def _tasks(workdir: epath.Path) -> Iterator[str]:
    """A table of the results of `evaluate --tasks --out FOLDER`, if FOLDER is the run's or lies in it."""
    folders = [workdir, *sorted(path for path in workdir.iterdir() if path.is_dir())]
    rows = []
    for file in (folder / TASKS_FILE for folder in folders):
        if not file.exists():
            continue
        try:
            result = json.loads(file.read_text())
            rows += [f"| {' | '.join(row)} | {result['step']} |" for row in _rows(result)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not the result of evaluate --tasks ({error}); move it elsewhere") from None
    if rows:
        yield from ("| task | metric | value | at step |", "| --- | --- | --- | --- |", *rows, "")


def _rows(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for task, metrics in result.get("tasks", {}).items():
        yield from ((task, metric, f"{value:.4f}") for metric, value in metrics.items() if isinstance(value, float))
    for record in result.get("long_context", ()):
        depth = "" if record["depth"] is None else f", depth {record['depth']:g}"
        yield record["task"], f"accuracy at {record['length']} tokens{depth}", f"{record['accuracy']:.4f}"


def _command(config: Config) -> Iterator[str]:
    """The command with a config file that has the run's settings, as far as they are not the defaults."""
    yield from (
        "Trained by `python -m deltaformer_jax.train --config config.py --workdir DIR`, with this config.py:",
        "",
    )
    yield from ("```python", "from deltaformer_jax.config import (")
    names = [field.default_factory.__name__ for field in dataclasses.fields(Config)]
    yield from (f"    {name}," for name in sorted(["Config", "Mixer", *names]))
    yield from (")", "", "", "def get_config():", "    return Config(")
    for section in dataclasses.fields(Config):
        given, default = getattr(config, section.name), section.default_factory()
        values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
        changed = {name: value for name, value in values.items() if value != getattr(default, name)}
        if changed:
            yield f"        {section.name}={section.default_factory.__name__}("
            yield from (f"            {name}={_said(value)}," for name, value in changed.items())
            yield "        ),"
    yield from ("    )", "```", "")


def _said(value: Any) -> str:
    """The value in Python."""
    if isinstance(value, Mixer):
        return f"Mixer({', '.join([repr(value.name), *(f'{name}={_said(x)}' for name, x in value.overrides)])})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_said, value))}{',' * (len(value) == 1)})"
    return f'float("{value}")' if isinstance(value, float) and value in (float("inf"), -float("inf")) else repr(value)
