"""What the objectives "mixed" and "longred" find when a run starts: texts of other lengths, the teacher, its layers.

DIR/objective.json holds it, so that a resumed run has the same teacher and layers, or is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from deltaformer_jax import data
from deltaformer_jax.config import Config
from deltaformer_jax.data import Corpus, Mixture, TaskData
from deltaformer_jax.model_parts import flat, nested
from deltaformer_jax.processes import common
from deltaformer_jax.training.checkpoints.checksums import CHECKSUMS
from deltaformer_jax.training.checkpoints.restore import restore
from deltaformer_jax.training.objectives.restoration import Teacher
from deltaformer_jax.training.objectives.rows import SHORT, STRETCHED, Rows, rows_beside
from deltaformer_jax.training.on_mesh.drift import divergence
from deltaformer_jax.training.position import Feed, Position
from deltaformer_jax.training.program import Program

FILE = "objective.json"
_FIELDS = {SHORT: "objective.short_data", STRETCHED: "objective.s2l_data"}

Text = Corpus | Mixture | TaskData
Texts = dict[str, tuple[Text, Rows]]


class Given(NamedTuple):
    """`arguments` of the training step after state and batch. `record`: FILE's content; {} for other objectives."""

    arguments: tuple
    record: dict[str, Any]

    def write(self, workdir: epath.Path) -> None:
        if self.record:
            (workdir / FILE).write_text(json.dumps(self.record) + "\n")


def texts_beside(config: Config, corpus: Text, mesh: Mesh) -> Texts:
    """The texts and rows that a batch has beside those of data.sequence_length; {} for other objectives.

    Raises ValueError or OSError, naming the field.
    """
    found = {}
    for name, rows in rows_beside(config, mesh).items():
        text = corpus
        if rows.data:
            try:
                text = data.load_data(rows.data)
            except (ValueError, OSError) as error:
                raise type(error)(f"{_FIELDS[name]} = {rows.data!r}: {error}") from None
            if text.tokenizer.hash != corpus.tokenizer.hash:
                raise ValueError(
                    f"{_FIELDS[name]} = {rows.data!r}: was prepared with another tokenizer than data.path; prepare it "
                    "with that one"
                )
        common.check_same(name, {f"hash of {_FIELDS[name]}": text.hash}, "give every process the same files")
        found[name] = (text, rows)
    return found


def find_given(
    config: Config,
    program: Program,
    corpus: Text,
    texts: Texts,
    feed: Feed,
    workdir: epath.Path,
    params: Any,
    note: Callable[[str], Any],
) -> Given:
    """What the run in `workdir` began with, or begins with if it is new. Writes nothing.

    feed: the run's batches. params: the model's; those before the first batch where the run is new. Raises ValueError
    or OSError, naming the field or the file.
    """
    if not texts and config.objective.name != "longred":
        return Given((), {})
    known = _read(workdir / FILE)
    record = {"texts": {name: text.hash for name, (text, _) in texts.items()}}
    for name, hash_now in record["texts"].items():
        if known and known["texts"].get(name) != hash_now:
            raise ValueError(f"{_FIELDS[name]}: its text is not that of the run in {workdir}; give what it began with")
    if config.objective.name == "mixed":
        return Given((), record)
    known = known and known["teacher"]
    teacher, record["teacher"] = _teacher(config, program, corpus, feed, workdir, known, params, note)
    return Given((teacher,), record)


def _teacher(config, program, corpus, feed, workdir, known, params, note) -> tuple[Teacher, dict[str, Any]]:
    folder = config.objective.teacher_workdir
    where = f"objective.teacher_workdir = {folder!r}"
    try:
        run = restore(folder, known and known["step"], note)
    except (ValueError, OSError) as error:
        raise type(error)(f"{where}: {str(error).removeprefix(f'--workdir {folder}: ')}") from None
    if run.tokenizer.hash != corpus.tokenizer.hash:
        raise ValueError(f"{where}: was trained with another tokenizer than data.path has")
    checksums = epath.Path(folder) / "checkpoints" / str(run.step) / CHECKSUMS
    found = {"step": run.step, "sha256": hashlib.sha256(checksums.read_bytes()).hexdigest()}
    if known and known["sha256"] != found["sha256"]:
        raise ValueError(
            f"{where}: its checkpoint of step {run.step} is not the one that the run in {workdir} began with; give "
            "that one's folder"
        )
    leaves, shardings = dict(flat(run.params)), dict(flat(program.teacher_shardings))
    placed = nested({path: jax.device_put(leaf, shardings[path]) for path, leaf in leaves.items()})
    if known:
        return Teacher(placed, jnp.asarray(known["layers"], jnp.int32)), known
    rule, layers = config.objective.compared(config.model.num_layers)
    if rule == "kl":
        changed = _divergence(program, feed, placed, params)
        found["divergence"] = changed.tolist()
        last = config.model.num_layers - 1
        layers = (*sorted(np.argsort(-changed[:last], kind="stable")[: layers[0]].tolist()), last)
    found["layers"] = list(layers)
    note(f"teacher: step {run.step} of {folder}, compared after layers {', '.join(map(str, layers))}")
    return Teacher(placed, jnp.asarray(layers, jnp.int32)), found


def _divergence(program: Program, feed: Feed, teacher: Any, params: Any) -> np.ndarray:
    """How much the extension has changed each layer's attention, over the first batch's short rows, if it has any."""
    batch = feed.to_devices(next(feed.stream(Position()))[1])
    models = (program.teacher_parts, teacher), (program.parts, params)
    return divergence(program.mesh, *models, batch.get(SHORT, batch))


def _read(path: epath.Path) -> dict[str, Any] | None:
    """The record of an earlier start. All processes read it before one of them writes."""
    text = common.first("objective", lambda: path.read_text() if path.exists() else None)
    try:
        return None if text is None else dict(json.loads(text))
    except (ValueError, TypeError):
        raise ValueError(f"{path}: damaged; start the run anew in another folder") from None
