"""The data that a run is evaluated on."""

import warnings
from pathlib import Path

from deltaformer_jax.host.waiting import say_aside


def check_same_kind(data: str | None, trained: str) -> None:
    """Raise ValueError, naming --data, unless both are text or both are the same task, with any options."""
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
    """The corpus to evaluate on, from --data, or from the run's config if `data` is None.

    Plain text is prepared in `folder` with the run's tokenizer; all of it is used for evaluation, or of a dataset with
    several splits a held-out one. Raises ValueError or FileNotFoundError, naming --data.
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
        tokenizer = str(folder / "tokenizer.json")
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            whole = prepare_corpus(data, folder / "corpus", tokenizer=tokenizer, eval_fraction=0.0, held_out=True)
        for note in notes:
            say_aside(f"note: {note.message}")
        text = whole.split("train")
        corpus = Corpus(whole.path, whole.manifest, whole.tokenizer, {"train": text, "eval": text})
    if corpus.tokenizer.hash != run.tokenizer.hash and library.is_task(str(data or corpus.path)):
        raise ValueError(
            f"--data {data}: {corpus.tokenizer.vocab_size} different tokens, the run has {run.tokenizer.vocab_size}; "
            f"give options with the same tokens as {run.config.data.path}"
        )
    if corpus.tokenizer.hash != run.tokenizer.hash:
        raise ValueError(
            f"{data or corpus.path}: prepared with another tokenizer than the run's; prepare it with --tokenizer "
            "and the path of the run's tokenizer.json"
        )
    return corpus
