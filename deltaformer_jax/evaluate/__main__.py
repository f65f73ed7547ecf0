"""Loss, perplexity and bits per byte of a run's model, by position too:

    python -m deltaformer_jax.evaluate --workdir DIR [--data PATH] [--step N] [--sequence_length N] [--batch_size N]
                                       [--batches N]

On the evaluation split of the run's own data; with --data on that of another prepared corpus (or several,
FOLDER=WEIGHT,FOLDER=WEIGHT), or on all of a text file or of a folder of text. Of a run on a synthetic task the accuracy
too, on request with other options (--data task:parity,shortest=41,longest=500 --sequence_length 501). A table goes to
stderr, and one line of JSON to stdout. A position is the number of tokens the model has seen of a document when it
predicts the next; with --sequence_length it may be a longer document than those it was trained on. Bad input: one line,
exit code 2.
"""

import json
import sys
import tempfile
from pathlib import Path

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.evaluate.corpus import evaluation_corpus
from deltaformer_jax.evaluate.report import progress, table
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.waiting import say_aside, waiting


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.evaluate",
        description="Loss, perplexity and bits per byte of a run's model, by position too.",
    )
    parser.add_argument("--workdir", type=expand, required=True, metavar="DIR", help="the run's folder; may be gs://")
    parser.add_argument(
        "--data", type=expand, metavar="PATH", help="a prepared corpus, or text (default: the run's own)"
    )
    parser.add_argument("--step", type=int, metavar="N", help="of which checkpoint (default: the newest)")
    parser.add_argument("--sequence_length", type=int, metavar="N", help="tokens in a row (default: the run's)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="sequences at a time (default: the run's)")
    parser.add_argument("--batches", type=int, default=0, metavar="N", help="only the first N (default: 0, all)")
    flags = parser.parse_args(arguments)

    with one_line_errors("deltaformer_jax.evaluate"), tempfile.TemporaryDirectory() as folder:
        with waiting("importing jax", say_aside):
            from deltaformer_jax.data import batches, count_batches
            from deltaformer_jax.sharding.mesh import batch_sharding, rows
            from deltaformer_jax.training.by_position import evaluate_by_position
            from deltaformer_jax.training.checkpoints.restore import restore

        if flags.batches < 0:
            raise ValueError(f"--batches {flags.batches}: give 0 (all of them) or more")
        for name in ("batch_size", "sequence_length"):
            if getattr(flags, name) is not None and getattr(flags, name) < 1:
                raise ValueError(f"--{name} {getattr(flags, name)}: give 1 or more")
        with waiting(f"restoring the model of {flags.workdir}", say_aside):
            run = restore(flags.workdir, flags.step, say_aside)
        with waiting("reading the data", say_aside):
            corpus = evaluation_corpus(run, flags.data, Path(folder))
        length = flags.sequence_length or run.config.data.sequence_length
        # Any batch gives the same sums: take one that these devices can share.
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
                sharding=batch_sharding(run.program.mesh),
                limit=flags.batches,
                advance=advance,
            )
    whole, by_position = sums.report(), sums.by_position()
    print(table(whole, by_position), file=sys.stderr)
    data = str(flags.data or corpus.path)
    print(json.dumps({"step": run.step, "data": data, "sequence_length": length, **whole, "by_position": by_position}))


if __name__ == "__main__":
    main()
