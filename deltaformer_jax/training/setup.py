"""Setting up a run: everything it needs is made and checked, the cheapest checks first."""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from deltaformer_jax import data
from deltaformer_jax.config import Config
from deltaformer_jax.config.checks import check
from deltaformer_jax.config.mixer import entry
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data import Corpus, Mixture, TaskData, Tokenizer, count_batches, is_task, stdlib_corpus
from deltaformer_jax.data.chat import CHAT_FILE
from deltaformer_jax.data.corpus import with_held_out_tail
from deltaformer_jax.host.claim import check_claim
from deltaformer_jax.host.waiting import waiting
from deltaformer_jax.layers.mixers import MIXERS
from deltaformer_jax.processes import common
from deltaformer_jax.sharding import CONTEXT_AXIS
from deltaformer_jax.sharding.device_memory import agree_on_memory, memory_limit
from deltaformer_jax.sharding.mesh import make_mesh, rows
from deltaformer_jax.training.checkpoints.initial import initial_state
from deltaformer_jax.training.checkpoints.restore import TOKENIZER_FILE
from deltaformer_jax.training.checkpoints.store import Checkpoints
from deltaformer_jax.training.checkpoints.vocabulary import with_vocabulary
from deltaformer_jax.training.memory import fitting_program
from deltaformer_jax.training.objectives.given import find_given, texts_beside
from deltaformer_jax.training.on_mesh.kept_whole import check_split
from deltaformer_jax.training.position import Feed, Position
from deltaformer_jax.training.program import Program, use_compilation_cache
from deltaformer_jax.training.state import TrainState
from deltaformer_jax.training.watch.ledger import FILE as TIME_FILE
from deltaformer_jax.training.watch.ledger import Ledger
from deltaformer_jax.training.watch.metrics import MetricsFile
from deltaformer_jax.training.watch.tensorboard import check_installed
from deltaformer_jax.training.watch.trackers import check_trackers
from deltaformer_jax.training.workdir import LOCK, saved_run


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that do not change while it trains.

    `config` has its vocabulary size filled in. `metrics` and `checkpoints` hold nothing after the step that training
    starts from.
    """

    config: Config
    workdir: epath.Path
    corpus: Corpus | Mixture | TaskData
    feed: Feed
    evaluation_batch_size: int
    program: Program
    train_step: Callable  # compiled
    begin: Callable[[Program], TrainState]  # returns the state before the first batch
    checkpoints: Checkpoints
    metrics: MetricsFile
    ledger: Ledger
    resumed: bool


class Prepared(NamedTuple):
    """A run, and where its training starts: `state` has seen `position.step` batches."""

    run: Run
    position: Position
    state: TrainState


def load_data(config: Config) -> Corpus | Mixture | TaskData:
    """The data that the config's `data` section names.

    Raises ValueError or FileNotFoundError that names the field or the folder.
    """
    found, tail = _load_data(config), config.data.eval_tail
    if not tail:
        return found
    try:
        if isinstance(found, Corpus):
            return with_held_out_tail(found, tail)
    except ValueError as error:
        raise ValueError(f"data.eval_tail = {tail}: {error}") from None
    raise ValueError(f"data.eval_tail = {tail}: for one prepared corpus without evaluation documents; leave it at 0")


def _load_data(config: Config) -> Corpus | Mixture | TaskData:
    if is_task(config.data.path):
        try:
            task = TaskData(config.data.path)
            task.check_length(config.data.sequence_length)
        except ValueError as error:
            raise ValueError(f"data.path = {error}") from None
        return task
    if config.data.path:
        return data.load_data(config.data.path)
    return stdlib_corpus(config.data.tokenizer)


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raise ValueError unless every device gets as many rows of each accumulation part of a batch, and tokens."""
    batch, parts, devices = config.data.batch_size, config.optimizer.accumulation_steps, rows(mesh)
    if batch % (parts * devices):
        raise ValueError(
            f"data.batch_size = {batch}: not a multiple of mesh.data * mesh.fsdp * optimizer.accumulation_steps = "
            f"{mesh.shape['data']} * {mesh.shape['fsdp']} * {parts} = {parts * devices}"
        )
    length, context = config.data.sequence_length, mesh.shape[CONTEXT_AXIS]
    if length % context:
        raise ValueError(f"data.sequence_length = {length}: not a multiple of mesh.context = {context}")
    tensor = mesh.shape["tensor"]
    if config.mesh.sequence_parallel and tensor == 1:
        raise ValueError(
            "mesh.sequence_parallel = True: splits tokens over the devices of mesh.tensor, which is 1; set mesh.tensor "
            "to 2 or more, or mesh.sequence_parallel=False"
        )
    if config.mesh.sequence_parallel and length % (context * tensor):
        raise ValueError(
            f"data.sequence_length = {length}: not a multiple of mesh.context * mesh.tensor = {context} * {tensor}, as "
            "mesh.sequence_parallel needs"
        )
    own = [mixer.name for mixer in map(entry, config.model.mixers) if mixer.name not in MIXERS]
    if own and context > 1:
        raise ValueError(
            f"mesh.context = {context}: the mixer {own[0]} is your own and would take a device's tokens for the whole "
            "row; set mesh.context=1"
        )


def prepare(
    config: Config,
    workdir: epath.PathLike,
    note: Callable[[str], Any] = lambda _: None,
    devices: list[jax.Device] | None = None,
    *,
    corpus: TaskData | None = None,
    evaluation_batch_size: int | None = None,
    make_program: Callable[[Config, Mesh], Program] = Program,
    begin: Callable[[Program], TrainState] | None = None,
    started: float | None = None,
) -> Prepared:
    """A new run in `workdir`, or the run in it, restored. Nothing is written before everything is checked.

    note                   called with a text about what is being done, if it takes long
    devices                default: all
    started                `time.time()` at the start of the process, for time.jsonl; default: now

    An experiment may replace what the config says:

    corpus                 a task instead of data.path
    evaluation_batch_size  rows; default: as in training
    make_program           may return the Program of an earlier run with the same model, optimizer and mesh
    begin                  returns the state before the first batch; default: new parameters from run.seed

    Raises ValueError, OSError or NotImplementedError with a message that names the field, file or argument and the fix.
    """
    check(config)
    if config.run.tensorboard:
        check_installed()
    check_trackers(config.run)
    use_compilation_cache(config.run.compilation_cache)
    workdir = epath.Path(workdir)
    ledger = Ledger(workdir / TIME_FILE if jax.process_index() == 0 else None, started or time.time())
    saved = saved_run(config, workdir)
    with waiting("finding the devices", note):
        _check_same_devices()
        mesh = make_mesh(config.mesh, devices)
        if jax.process_count() > 1:
            agree_on_memory(common.gather("memory of a device", memory_limit(mesh)))
    check_batch(config, mesh)
    with waiting(_what_is_read(config), note):
        corpus = corpus or load_data(config)
    _check_same_everywhere(corpus)
    if saved is not None:
        _check_same_data(saved, corpus, workdir)
    _check_evaluation(config, corpus)
    full = with_vocabulary(config, corpus.tokenizer)
    texts = texts_beside(full, corpus, mesh)
    begin = _said(begin or _beginning(full, corpus.tokenizer, note), full, note)
    # Traced before anything is written, since tracing the model checks the rest of the config.
    with ledger.within("compiling"):
        program = fitting_program(full, mesh, note, make_program)
    check_split(program.parts, mesh, full.mesh.strict, note, zero1=full.mesh.zero1)
    feed = Feed(full, corpus, mesh, texts)
    find = functools.partial(find_given, full, program, corpus, texts, feed, workdir, note=note)
    fresh = begin(program) if saved is None else None  # it may refuse run.init_from
    given = None if fresh is None else find(fresh.params)

    if jax.process_index() == 0:
        check_claim(str(workdir), LOCK)
        workdir.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(workdir / "checkpoints", full.run.keep_checkpoints)
    checkpoints.settle()
    resumed = bool(checkpoints.steps())
    if resumed:
        with waiting(f"restoring from {workdir / 'checkpoints'}", note):
            state, record = checkpoints.restore_newest(program.abstract, note)
        position = Position.from_record(record)
        if position.step > config.run.steps:
            made = f"the run in {workdir} has made {position.step} steps; give a larger run.steps"
            raise ValueError(f"run.steps = {config.run.steps}: {made}")
        checkpoints.drop_after(position.step)
    else:
        state, position = begin(program) if fresh is None else fresh, Position()
    given = given or find(state.params)
    if jax.process_index() == 0:
        Saved(config, corpus.tokenizer.hash, corpus.hash).write(workdir)
        (workdir / TOKENIZER_FILE).write_text(corpus.tokenizer.file_text)
        if chat := _chat_settings(corpus):
            (workdir / CHAT_FILE).write_text(json.dumps(chat) + "\n")
        given.write(workdir)
    what = f"compiling for {mesh.size} {jax.devices()[0].device_kind} device{'s' * (mesh.size > 1)}"
    with waiting(what, note), ledger.within("compiling"):
        train_step = _with(program.compile_train_step(full.data), given.arguments)
        if jax.process_index() == 0:
            check_claim(str(workdir), LOCK)  # another process may have begun while this one compiled
        common.gather("compiling", None)  # so that the first step meets the others, as in create_state
    run = Run(
        config=full,
        workdir=workdir,
        corpus=corpus,
        feed=feed,
        evaluation_batch_size=evaluation_batch_size or full.data.batch_size,
        program=program,
        train_step=train_step,
        begin=begin,
        checkpoints=checkpoints,
        metrics=MetricsFile(workdir / "metrics.jsonl", position.step),
        ledger=ledger,
        resumed=resumed,
    )
    ledger.write(position.step)
    return Prepared(run, position, state)


def _with(step: Callable, arguments: tuple) -> Callable:
    """(state, batch) -> step(state, batch, *arguments)."""
    return (lambda state, batch: step(state, batch, *arguments)) if arguments else step


def _chat_settings(corpus: Corpus | Mixture | TaskData) -> dict[str, Any]:
    """The form of the conversations, in a mixture of the first corpus of them; {} if there are none."""
    parts = corpus.corpora if isinstance(corpus, Mixture) else () if isinstance(corpus, TaskData) else (corpus,)
    return next((chat for part in parts if (chat := part.manifest["settings"].get("chat"))), {})


def _beginning(config: Config, tokenizer: Tokenizer, note: Callable[[str], Any]) -> Callable[[Program], TrainState]:
    """What makes the state before the first batch: new parameters, or those of run.init_from."""
    seed, source = config.run.seed, config.run.init_from
    if not source:
        return lambda program: program.create_state(seed)
    return lambda program: initial_state(program, seed, source, tokenizer, note)


def _said(begin: Callable[[Program], TrainState], config: Config, note: Callable[[str], Any]) -> Any:
    """`begin`, which says so if it takes long."""
    source = config.run.init_from
    what = f"reading the parameters of {source}" if source else "creating the parameters"

    def said(program: Program) -> TrainState:
        with waiting(what, note):
            return begin(program)

    return said


def _what_is_read(config: Config) -> str:
    path, tokenizer = config.data.path, config.data.tokenizer
    if path:
        return f"reading {path}"
    learnt = f"; learning {tokenizer.removeprefix('bpe:')} tokens from it" if tokenizer.startswith("bpe:") else ""
    return f"reading Python's standard library{learnt}"


def _check_evaluation(config: Config, corpus: Corpus | Mixture | TaskData) -> None:
    if config.run.eval_every:
        try:
            count_batches(corpus, "eval", sequence_length=config.data.sequence_length, batch_size=1)
        except ValueError as error:
            one = isinstance(corpus, Corpus)
            tail = ", or data.eval_tail=0.1 to keep the end of each document for evaluation" if one else ""
            raise ValueError(f"{error}; or set run.eval_every=0{tail}") from None


def _check_same_devices() -> None:
    """Raise ValueError, in every process of the run, unless all have as many devices, and of the same kind."""
    found = jax.local_devices()
    mine = {"number of devices": len(found), "kind of devices": found[0].device_kind}
    common.check_same("devices", mine, "give every process of a run as many devices, of the same kind")


def _check_same_everywhere(corpus: Corpus | Mixture | TaskData) -> None:
    """Raise ValueError, in every process of the run, unless all have the same data. None has written anything yet."""
    hashes = {"hash of the data": corpus.hash, "hash of their tokenizer": corpus.tokenizer.hash}
    common.check_same("data", hashes, "data.path must hold the same files for every process")


def _check_same_data(saved: Saved, corpus: Corpus | Mixture | TaskData, workdir: epath.Path) -> None:
    if not saved.corpus_hash:
        raise ValueError(
            f"--workdir {workdir}: was converted from a folder of weights and never trained; start a run from it in "
            f"another folder, --config.run.init_from={workdir}"
        )
    if saved.corpus_hash != corpus.hash and isinstance(corpus, TaskData):
        raise ValueError(
            f"data.path = {corpus.path!r}: not the data of the run in {workdir}; set data.path to what the run was "
            f"started with, {saved.config.data.path!r}"
        )
    if saved.tokenizer_hash != corpus.tokenizer.hash:
        raise ValueError(
            f"{corpus.path}: its tokenizer (hash {corpus.tokenizer.hash[:12]}) is not the one of the run in {workdir} "
            f"({saved.tokenizer_hash[:12]}); set data.path to the data the run was started with"
        )
    if saved.corpus_hash != corpus.hash:
        raise ValueError(
            f"{corpus.path}: its text (hash {corpus.hash[:12]}) is not that of the run in {workdir} "
            f"({saved.corpus_hash[:12]}); set data.path to the data the run was started with"
        )
