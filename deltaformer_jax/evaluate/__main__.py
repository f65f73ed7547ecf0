"""Loss, perplexity and bits per byte of a run's model, overall and by position; or its answers to tasks:

    python -m deltaformer_jax.evaluate --workdir DIR [--data PATH] [--step N] [--sequence_length N] [--batch_size N]
                                       [--batches N]
    python -m deltaformer_jax.evaluate --workdir DIR --tasks NAME,... [--out FOLDER] [--step N] [--sequence_length N]
                                       [--batch_size N] [--fewshot N] [--limit N] [--include FOLDER] [--no_separator]
                                       [--lengths N ...] [--depths SHARE ...] [--examples N] [--seed N]

The data is the evaluation split of the run's own data. With --data it is the evaluation split of another prepared
corpus (or of several, FOLDER=WEIGHT,FOLDER=WEIGHT), or all of a text file or of a folder of text. A run on a synthetic
task is also evaluated by accuracy; --data may give the same task with other options, as in
--data task:parity,shortest=41,longest=500 --sequence_length 501.

A position is the number of tokens of its document that the model has seen when it predicts the next token. With
--sequence_length documents may be longer than in training. A table goes to stderr, and one line of JSON to stdout.
Wrong input gives one line on stderr and exit code 2.

--tasks asks for other things. needle, needle_multikey, variable_tracking and common_words hide something in a text of
each of --lengths tokens, and give the share that is found. All other names are tasks of lm-evaluation-harness (the
extra "eval"), offline_choice, offline_copy and offline_texts among them, which need no network. docs/evaluation.md
explains both.
"""

import json
import sys
import tempfile
from pathlib import Path

from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.evaluate.corpus import evaluation_corpus
from deltaformer_jax.evaluate.report import progress, table
from deltaformer_jax.evaluate.task_flags import add_task_flags, refuse_task_flags, split_names
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.waiting import say_aside, waiting


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.evaluate",
        description="Loss, perplexity and bits per byte of a run's model, overall and by position.",
    )
    parser.add_argument("--workdir", type=expand, required=True, metavar="DIR", help="the run's folder; may be gs://")
    parser.add_argument(
        "--data",
        type=expand,
        metavar="PATH",
        help="a prepared corpus, a text file, a folder of text, or task:NAME,option=value (default: the run's data)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the checkpoint to use (default: the newest)")
    parser.add_argument("--sequence_length", type=int, metavar="N", help="tokens per row (default: the run's)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="rows per batch (default: the run's)")
    parser.add_argument(
        "--batches", type=int, metavar="N", help="evaluate only the first N batches; 0: all (default: 0)"
    )
    add_task_flags(parser)
    flags = parser.parse_args(arguments)

    with one_line_errors("deltaformer_jax.evaluate"), tempfile.TemporaryDirectory() as folder:
        if flags.batches is not None and flags.batches < 0:
            raise ValueError(f"--batches {flags.batches}: give 0 (all batches) or more")
        for name in ("batch_size", "sequence_length"):
            if getattr(flags, name) is not None and getattr(flags, name) < 1:
                raise ValueError(f"--{name} {getattr(flags, name)}: give 1 or more")
        Saved.read(epath.Path(flags.workdir))  # a wrong folder is said before jax is imported
        if flags.tasks is not None:
            return answer_tasks(flags)
        refuse_task_flags(flags)
        with waiting("importing jax", say_aside):
            from deltaformer_jax.config.remarks.rotary_bound import beyond_bound
            from deltaformer_jax.data import batches, count_batches
            from deltaformer_jax.evaluate.by_position import evaluate_by_position
            from deltaformer_jax.sharding.mesh import rows
            from deltaformer_jax.training.checkpoints.restore import restore

        with waiting(f"restoring the model of {flags.workdir}", say_aside):
            run = restore(flags.workdir, flags.step, say_aside)
        with waiting("reading the data", say_aside):
            corpus = evaluation_corpus(run, flags.data, Path(folder))
        length = flags.sequence_length or run.config.data.sequence_length
        if length > run.config.data.sequence_length:  # of shorter ones training has said it
            for line in beyond_bound(run.config.model, length):
                say_aside(f"--sequence_length {length}: {line}")
        # The batch size does not change the sums. Round it up to a multiple of what the devices need.
        size, parts = flags.batch_size or run.config.data.batch_size, rows(run.program.mesh)
        shape = {"sequence_length": length, "batch_size": -(-size // parts) * parts}
        count = count_batches(corpus, "eval", **shape)
        with progress(min(count, flags.batches or count)) as advance, waiting("evaluating", say_aside):
            sums = evaluate_by_position(
                run.program.parts,
                run.program.mesh,
                run.params,
                batches(corpus, "eval", **shape, seed=0),
                sequence_length=length,
                token_bytes=corpus.tokenizer.token_bytes,
                limit=flags.batches or 0,
                advance=advance,
            )
    whole, by_position = sums.report(), sums.by_position()
    print(table(whole, by_position), file=sys.stderr)
    data = str(flags.data or corpus.path)
    print(json.dumps({"step": run.step, "data": data, "sequence_length": length, **whole, "by_position": by_position}))


def answer_tasks(flags) -> None:
    """Print the answers to --tasks: a table on stderr, JSON on stdout."""
    split_names(flags)  # a wrong name is said before the model is read
    with waiting("importing jax", say_aside):
        from deltaformer_jax.evaluate import by_task
        from deltaformer_jax.model_parts import merge
        from deltaformer_jax.training.checkpoints.restore import restore

    with waiting(f"restoring the model of {flags.workdir}", say_aside):
        run = restore(flags.workdir, flags.step, say_aside)
    result = by_task.run(flags, run, merge(run.program.parts, run.params))
    print(by_task.table(result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
