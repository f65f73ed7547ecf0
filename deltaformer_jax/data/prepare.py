"""Prepare a corpus to train on from text:

    python -m deltaformer_jax.data.prepare SOURCE --out DIR [--tokenizer bytes|FILE|bpe:SIZE] [--workers N]

SOURCE           a folder, or a file, of text or code, .jsonl (each also .gz, .zst) or .parquet. Files and documents may
                 be of any size. Default: the standard library of the running Python
--eval_fraction  the fraction of documents kept for evaluation
--text_field     the field of JSON lines, or the column of Parquet, that holds the text; meta.text is a field of a field
--chat           documents are conversations: plain, template (the tokenizer's own) or a Jinja file
--subset         which subset to read of a folder that is a dataset of the Hugging Face hub
--split          which split of it, by its name in the files' names (default: train, where there are several)
--separator      divides text files into documents
--on_error       what to do about a document or file that cannot be read: stop, naming it, or skip it
--force          replace a corpus that DIR already holds

In a folder, links are followed and each file is read once. Pipes, sockets, devices and files of other kinds are left
out. DIR/left_out.txt names everything that was left out. After a kill, an interruption or an error the same command
continues where it was. Exit code 0 if DIR holds the corpus; otherwise 2, with one line on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.data.build import can_go_on, prepare_corpus
from deltaformer_jax.data.corpus import MANIFEST_FILE, SPLITS, Corpus
from deltaformer_jax.data.sources import STDLIB, Unreadable
from deltaformer_jax.data.sources.left_out import LEFT_OUT_FILE
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.waiting import say_aside, waiting

PROGRAM = "deltaformer_jax.data.prepare"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.data.prepare", description="Prepares a corpus to train on from text."
    )
    parser.add_argument(
        "source",
        nargs="?",
        type=expand,
        default=STDLIB,
        metavar="SOURCE",
        help="folder or file (default: Python's standard library)",
    )
    parser.add_argument("--out", type=expand, required=True, metavar="DIR", help="the folder to make, on a local disk")
    parser.add_argument("--tokenizer", type=expand, default="bytes", help="bytes (default), bpe:SIZE or a file")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1; more help with BPE from 50 MB)")
    parser.add_argument("--eval_fraction", type=float, default=0.02, help="fraction for evaluation (default: 0.02)")
    parser.add_argument(
        "--text_field", default="", help="field of JSON lines or Parquet (default: text; with --chat: messages)"
    )
    parser.add_argument(
        "--chat",
        type=expand,
        default="",
        metavar="FORM",
        help="read conversations and train on the answers: plain, template (the tokenizer's) or a Jinja file",
    )
    parser.add_argument("--subset", default="", help="subset of a dataset of the Hugging Face hub")
    parser.add_argument("--split", default="", help="split of such a dataset (default: the only one, or train)")
    parser.add_argument("--separator", default="", help="divides text files into documents (\\n: new line)")
    parser.add_argument(
        "--on_error",
        choices=("stop", "skip"),
        default="stop",
        help="at a document or file that cannot be read: stop (default), or skip it",
    )
    parser.add_argument("--force", action="store_true", help="replace a corpus that DIR already holds")
    flags = parser.parse_args(arguments)
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(flags.workers, 1)))  # the number of threads for learning BPE
    already = os.path.exists(os.path.join(flags.out, MANIFEST_FILE)) and not flags.force
    try:
        if not flags.out:
            raise ValueError("--out is empty; name a folder")
        if not already and can_go_on(flags.out):
            print(
                f"{flags.out}: going on with an unfinished preparation, if its settings are the same", file=sys.stderr
            )
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
            with _says_so(flags):
                corpus = prepare_corpus(
                    flags.source,
                    flags.out,
                    tokenizer=flags.tokenizer,
                    workers=flags.workers,
                    eval_fraction=flags.eval_fraction,
                    text_field=flags.text_field,
                    separator=flags.separator.replace("\\n", "\n"),
                    chat=flags.chat,
                    subset=flags.subset,
                    split=flags.split,
                    on_error=flags.on_error,
                    force=flags.force,
                    progress=sys.stderr.isatty(),
                )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        hint = "; --on_error skip leaves out what cannot be read" if isinstance(error, Unreadable) else ""
        if hint and can_go_on(flags.out):
            hint += ", and the finished part is kept"
        print(f"{PROGRAM}: error: {' '.join(str(error).splitlines())}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        rest = "; the same command continues from here" if can_go_on(flags.out) else ""
        print(f"{PROGRAM}: error: interrupted; {flags.out} is unchanged{rest}", file=sys.stderr)
        return 130
    print(f"{corpus.path}: {'is there already' if already else 'prepared'}, vocabulary {corpus.tokenizer.vocab_size}")
    for name in SPLITS:
        entry = corpus.manifest["splits"][name]
        print(f"  {name:5} {entry['documents']:,} documents, {entry['tokens']:,} tokens, {entry['bytes']:,} bytes")
    _print_left_out(corpus)
    if not corpus.split("eval").documents:
        tail = "" if corpus.split("train").masked else " or, in training,"
        print(f"  the eval split has no documents: evaluation needs more, a larger --eval_fraction{tail}")
        if tail:
            print("  --config.data.eval_tail=0.1, which keeps the end of each document for evaluation")
    return 0


def _says_so(flags: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Without a bar, in a log or a pipe, a line about the work, again with the seconds so far."""
    if sys.stderr.isatty():
        return contextlib.nullcontext()
    learning = "learning a tokenizer and " if flags.tokenizer.startswith("bpe:") else ""
    return waiting(f"{learning}preparing {flags.source}", say_aside)


def _print_left_out(corpus: Corpus) -> None:
    files, on_error = corpus.manifest["source_files_left_out"], corpus.manifest.get("left_out_on_error", 0)
    path = corpus.path / LEFT_OUT_FILE
    if files:
        print(f"  left out {files:,} files that are not text, code, JSON lines or Parquet, or cannot be opened:")
        print(f"  {path} names them" if path.exists() else "  (the version that prepared it did not name them)")
    if on_error:
        print(f"  left out {on_error:,} documents or files that cannot be read; {path} names them. The first:")
        with open(path, encoding="utf-8", newline="\n") as file:
            for line in itertools.islice(file, files, files + 5):
                print("   ", line.removesuffix("\n"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the program can clean up
    sys.exit(main())
