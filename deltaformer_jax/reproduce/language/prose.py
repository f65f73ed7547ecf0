"""English prose that every machine with Python has: its reference manual, and the docstrings of its library."""

from __future__ import annotations

import ast
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from deltaformer_jax.data import prepare_corpus

# Folders of the standard library that are tests, or not the library's.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def prose_corpus(folder: os.PathLike) -> str:
    """The path of the corpus in `folder`, prepared unless it is there: about 2 MB of bytes, a tenth for evaluation."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    texts, corpus = folder / "prose.jsonl", folder / "corpus"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose()), encoding="utf-8")
    prepare_corpus(texts, corpus, eval_fraction=0.1)
    return str(corpus)


def prose() -> Iterator[str]:
    """The topics of pydoc, which are sections of Python's reference manual, and each module's docstrings."""
    from pydoc_data.topics import topics

    yield from topics.values()
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if not _LEFT_OUT & set(file.parts) and (text := _docstrings(file)):
            yield text


def _docstrings(file: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sequences such as "\\d" in a file that is only read
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            return ""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(text for text in found if text)
