"""Loss and bits per byte of a run's model:

    python -m deltaformer_jax.evaluate --workdir DIR [--data PATH] [--step N] [--batch_size N]

On the evaluation split of the run's own data; with --data on that of another prepared corpus, or on all of a text file
or of a folder of text. Prints one line of JSON. Bad input: one line, exit code 2.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from deltaformer_jax.training.command_line import one_line_errors


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deltaformer_jax.evaluate", description="Loss and bits per byte of a run's model."
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="the run's folder; may be gs://")
    parser.add_argument("--data", metavar="PATH", help="a prepared corpus, or text (default: the run's own data)")
    parser.add_argument("--step", type=int, metavar="N", help="of which checkpoint (default: the newest)")
    parser.add_argument("--batch_size", type=int, metavar="N", help="sequences at a time (default: the run's)")
    flags = parser.parse_args(arguments)

    with one_line_errors("deltaformer_jax.evaluate"), tempfile.TemporaryDirectory() as folder:
        from deltaformer_jax.data import batches
        from deltaformer_jax.training.evaluation import evaluate, make_evaluation_step
        from deltaformer_jax.training.restore import restore
        from deltaformer_jax.training.sharding import batch_sharding, rows

        run = restore(flags.workdir, flags.step, lambda text: print(text, file=sys.stderr))
        corpus = evaluation_corpus(run, flags.data, Path(folder))
        # Any batch gives the same sums: take one that these devices can share.
        size, parts = flags.batch_size or run.config.data.batch_size, rows(run.mesh)
        if size < 1:
            raise ValueError(f"--batch_size {size}: give 1 or more")
        result = evaluate(
            make_evaluation_step(run.parts, run.mesh),
            run.params,
            batches(
                corpus,
                "eval",
                sequence_length=run.config.data.sequence_length,
                batch_size=-(-size // parts) * parts,
                seed=0,
            ),
            token_bytes=corpus.tokenizer.token_bytes,
            sharding=batch_sharding(run.mesh),
        )
        print(json.dumps({"step": run.step, "data": str(flags.data or corpus.path), **result._asdict()}))


def evaluation_corpus(run, data: str | None, folder: Path):
    """The corpus to evaluate on; plain text is prepared with the run's tokenizer in `folder`, all of it for evaluation.

    Raises ValueError or FileNotFoundError naming --data.
    """
    from deltaformer_jax.data import Corpus, load_corpus, prepare_corpus
    from deltaformer_jax.data.corpus import MANIFEST_FILE
    from deltaformer_jax.training.setup import load_data

    if data is None:
        corpus = load_data(run.config)
    elif not Path(data).exists():
        raise FileNotFoundError(f"--data {data}: no such file or folder")
    elif (Path(data) / MANIFEST_FILE).exists():
        corpus = load_corpus(data)
    else:
        run.tokenizer.save(folder / "tokenizer.json")
        whole = prepare_corpus(data, folder / "corpus", tokenizer=str(folder / "tokenizer.json"), eval_fraction=0.0)
        text = whole.split("train")
        corpus = Corpus(whole.path, whole.manifest, whole.tokenizer, {"train": text, "eval": text})
    if corpus.tokenizer.hash != run.tokenizer.hash:
        raise ValueError(
            f"{data or corpus.path}: prepared with another tokenizer than the run's; prepare it with --tokenizer "
            "and the run's tokenizer.json"
        )
    return corpus


if __name__ == "__main__":
    main()
