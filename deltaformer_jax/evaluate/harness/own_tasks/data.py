"""The examples of the package's own tasks, read from the files beside this one: no network, no cache."""

import json
from pathlib import Path

import datasets


def load(file: str, **_) -> dict[str, datasets.Dataset]:
    """The split "test" of a task: one example for each line of `file`. The harness passes the task's metadata too."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
