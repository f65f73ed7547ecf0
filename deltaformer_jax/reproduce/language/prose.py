"""English prose that every machine with Python has: its reference manual, and the docstrings of its library."""

from __future__ import annotations

import ast
import json
import platform
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from deltaformer_jax.data import corpus as layout
from deltaformer_jax.data import load_corpus, prepare_corpus
from deltaformer_jax.data.remote.store import cache_folder

# Folders of the standard library that are tests, or not the library's.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}


def prose_corpus() -> str:
    """The path of the corpus, prepared once per Python: about 2 MB of bytes, a tenth of the texts for evaluation.

    It stands beside the standard library's corpus, in $XDG_CACHE_HOME/deltaformer_jax. Several processes may call this
    at once.
    """
    folder = cache_folder() / f"prose-{platform.python_version()}-v{layout.FORMAT_VERSION}"
    if not (folder / layout.MANIFEST_FILE).exists():
        with tempfile.TemporaryDirectory() as texts:
            source = Path(texts) / "prose.jsonl"
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in prose()), encoding="utf-8")
            try:
                prepare_corpus(source, folder, eval_fraction=0.1)
            except FileExistsError:
                load_corpus(folder)  # another process was first, or a ValueError says what stands there
    return str(folder)


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
