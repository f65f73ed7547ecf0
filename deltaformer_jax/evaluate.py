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

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.command_line import one_line_errors


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.evaluate",
        description="Loss, perplexity and bits per byte of a run's model, by position too.",
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder; may be gs://")
    parser.add_argument("--data", metavar="PATH", help="a prepared corpus, or text (default: the run's own data)")
    parser.add_argument("--step", type=int, metavar="N", help="of which checkpoint (default: the newest)")
    parser.add_argument("--sequence_length", type=int, metavar="N", help="tokens in a row (default: the run's)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="sequences at a time (default: the run's)")
    parser.add_argument("--batches", type=int, default=0, metavar="N", help="only the first N (default: 0, all)")
    flags = parser.parse_args(arguments)

    with one_line_errors("deltaformer_jax.evaluate"), tempfile.TemporaryDirectory() as folder:
        from deltaformer_jax.data import batches, count_batches
        from deltaformer_jax.sharding.mesh import batch_sharding, rows
        from deltaformer_jax.training.by_position import evaluate_by_position
        from deltaformer_jax.training.checkpoints.restore import restore

        if flags.batches < 0:
            raise ValueError(f"--batches {flags.batches}: give 0 (all of them) or more")
        for name in ("batch_size", "sequence_length"):
            if getattr(flags, name) is not None and getattr(flags, name) < 1:
                raise ValueError(f"--{name} {getattr(flags, name)}: give 1 or more")
        run = restore(flags.workdir, flags.step, lambda text: print(text, file=sys.stderr))
        corpus = evaluation_corpus(run, flags.data, Path(folder))
        length = flags.sequence_length or run.config.data.sequence_length
        # Any batch gives the same sums: take one that these devices can share.
        size, parts = flags.batch_size or run.config.data.batch_size, rows(run.program.mesh)
        shape = {"sequence_length": length, "batch_size": -(-size // parts) * parts}
        count = count_batches(corpus, "eval", **shape)
        with progress(min(count, flags.batches or count)) as advance:
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


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """advance() of a bar on stderr, if that is a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    with progress.Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("evaluating", total=total)
        yield lambda: bar.advance(task)


def table(whole: dict[str, Any], by_position: list[dict[str, Any]]) -> str:
    """Lines for people, the whole last."""
    score = ("accuracy", "accuracy") if "accuracy" in whole else ("bits_per_byte", "bits per byte")
    lines = [("position", "tokens", "loss", "perplexity", score[1])]
    for report in [*by_position, whole]:
        first, last = report.get("from"), report.get("to")
        name = "all" if first is None else str(first) if first == last else f"{first}-{last}"
        numbers = [report[key] for key in ("loss", "perplexity", score[0])]
        lines.append((name, f"{report['tokens']:,}", *("-" if n is None else f"{n:,.4f}" for n in numbers)))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in lines)


def check_same_kind(data: str | None, trained: str) -> None:
    """Raise ValueError naming --data where it is not what the run learnt: text, or the same task with any options."""
    from deltaformer_jax.data import is_task
    from deltaformer_jax.tasks.spec import read_spec

    if data is None or not (is_task(data) or is_task(trained)):
        return
    if not is_task(trained):
        raise ValueError(f"--data {data}: the run was trained on text; give text")
    name, _ = read_spec(trained)
    if not is_task(data) or read_spec(data)[0] != name:
        raise ValueError(f"--data {data}: the run was trained on {trained}; give task:{name} with any options")


def evaluation_corpus(run, data: str | None, folder: Path):
    """The corpus to evaluate on; plain text is prepared with the run's tokenizer in `folder`, all of it for evaluation.

    Raises ValueError or FileNotFoundError naming --data.
    """
    from deltaformer_jax import data as library
    from deltaformer_jax.data import Corpus, prepare_corpus
    from deltaformer_jax.data.corpus import MANIFEST_FILE
    from deltaformer_jax.training.setup import load_data

    check_same_kind(data, run.config.data.path)
    if data is None:
        corpus = load_data(run.config)
    elif library.is_task(data) or "://" in data or (Path(data) / MANIFEST_FILE).exists():
        corpus = library.load_data(data)
    elif not Path(data).exists() and "=" in data:
        corpus = library.load_data(data)
    elif not Path(data).exists():
        raise FileNotFoundError(f"--data {data}: no such file or folder")
    else:
        run.tokenizer.save(folder / "tokenizer.json")
        whole = prepare_corpus(data, folder / "corpus", tokenizer=str(folder / "tokenizer.json"), eval_fraction=0.0)
        text = whole.split("train")
        corpus = Corpus(whole.path, whole.manifest, whole.tokenizer, {"train": text, "eval": text})
    if corpus.tokenizer.hash != run.tokenizer.hash and library.is_task(str(data or corpus.path)):
        raise ValueError(
            f"--data {data}: {corpus.tokenizer.vocab_size} different tokens, the run has {run.tokenizer.vocab_size}; "
            f"give options that leave them as in {run.config.data.path}"
        )
    if corpus.tokenizer.hash != run.tokenizer.hash:
        raise ValueError(
            f"{data or corpus.path}: prepared with another tokenizer than the run's; prepare it with --tokenizer "
            "and the run's tokenizer.json"
        )
    return corpus


if __name__ == "__main__":
    main()
