"""DIR/metrics.jsonl: the metrics of a run."""

import json
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from deltaformer_jax.config.lines import lines


class MetricsFile:
    """A file of JSON lines, one record per line, each with its `step`, in the order of writing.

    Opening it for a run restored at `step` drops records of later steps and an incomplete last line. Records are
    appended. Object stores (gs://) cannot append: there the whole file is written again.

    Of several processes only the first reads and writes the file; for the others this holds what they would write.
    """

    def __init__(self, path: epath.PathLike, step: int):
        self._path = epath.Path(path)
        self._appends = "://" not in str(path)
        self.records = []
        self._followers: list[Callable[[dict[str, Any]], None]] = []
        self._mine = jax.process_index() == 0
        if self._mine and self._path.exists():
            for line in lines(self._path.read_text()):
                try:
                    record = json.loads(line)
                    keep = record["step"] <= step
                except (ValueError, KeyError, TypeError):
                    break  # the incomplete line of a run that was killed
                if keep:
                    self.records.append(record)
        self._rewrite()

    def _rewrite(self) -> None:
        if not self._mine:
            return
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        if self._appends:
            # Through a second file, so that a kill during the write loses nothing.
            draft = self._path.with_name(self._path.name + ".tmp")
            draft.write_text(text)
            draft.replace(self._path)
        else:
            self._path.write_text(text)

    def follow(self, follower: Callable[[dict[str, Any]], None]) -> None:
        """Call `follower` with every record written from now on."""
        self._followers.append(follower)

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        for follower in self._followers:
            follower(record)
        if self._appends and self._mine:
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        else:
            self._rewrite()

    def cut(self, step: int) -> None:
        """Drop what was written after `step`, to which the run has gone back."""
        self.records = [record for record in self.records if record["step"] <= step]
        self._rewrite()

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """The record of the evaluation at `step`, or None."""
        found = (record for record in reversed(self.records) if record["step"] == step and "eval_loss" in record)
        return next(found, None)
