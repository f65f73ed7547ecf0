"""Writes the records of metrics.jsonl and statistics.jsonl as TensorBoard curves into DIR/tensorboard."""

from typing import Any

from etils import epath

from deltaformer_jax.host.called import install
from deltaformer_jax.training.watch.scalars import scalars


class TensorBoard:
    """Writes records {step, name: number or {name: number}, ...}. Other values are ignored.

    What an earlier process wrote after `step` is removed from the curves. Raises ValueError if tensorboardX is not
    installed.
    """

    def __init__(self, workdir: epath.PathLike, step: int):
        check_installed()
        self._folder = str(epath.Path(workdir) / "tensorboard")
        self._open(step)

    def _open(self, step: int) -> None:
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(self._folder, purge_step=step + 1, flush_secs=10)

    def cut(self, step: int) -> None:
        """Drop what was written after `step`, to which the run has gone back."""
        self._writer.close()
        self._open(step)

    def write(self, record: dict[str, Any]) -> None:
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        self._writer.close()


def check_installed() -> None:
    try:
        import tensorboardX  # noqa: F401
    except ImportError:
        raise ValueError(
            f"run.tensorboard = True: needs tensorboardX, which is not installed: {install('tensorboard')}"
        ) from None
