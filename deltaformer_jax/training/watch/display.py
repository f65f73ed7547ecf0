"""The progress that a run prints: a live bar on a terminal, lines in a file or a cluster's log."""

import sys
from typing import Any

import rich.console
import rich.progress

# What objectives beside the usual one minimise too, as it is shown.
TERMS = {
    "short_loss": "short",
    "short_distance": "short distance",
    "s2l_distance": "stretched distance",
    "balance_loss": "balance",
    "router_z_loss": "router z",
    "expert_load": "expert load",
}


class Display:
    """A live bar on a terminal; elsewhere one line per logged step. `quiet`: print nothing."""

    def __init__(self, total: int, start: int, *, quiet: bool = False):
        self._total, self._quiet = total, quiet
        self._console = rich.console.Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=quiet)
        self._bar = None
        if self._console.is_terminal and not quiet:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.description}"),
                rich.progress.TextColumn("eta"),
                rich.progress.TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, record: dict[str, Any], seconds_per_step: float | None) -> None:
        rate = ""
        if record["tokens_per_second"]:
            mfu = f"{100 * record['mfu']:.1f} %" if "mfu" in record else "-"
            rate = f"{_short(record['tokens_per_second'])} tokens/s  MFU {mfu}"
        right = f"accuracy {record['accuracy']:.4f}  " if "accuracy" in record else ""
        right += f"of {record['depth']} layers  " if "depth" in record else ""
        right += "".join(f"{name} {record[key]:.4f}  " for key, name in TERMS.items() if key in record)
        text = f"loss {record['loss']:.4f}  {right}{rate}".rstrip()
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=record["step"])
            return
        if seconds_per_step is not None:
            text += f"  eta {_clock((self._total - record['step']) * seconds_per_step)}"
        self.note(f"step {record['step']}/{self._total}  {text}  gradient {record['grad_norm']:.3g}")

    def evaluation(self, record: dict[str, Any], seconds: float) -> None:
        score = f"accuracy {record['eval_accuracy']:.4f}, " if "eval_accuracy" in record else ""
        if "eval_bits_per_byte" in record:
            score += f"{record['eval_bits_per_byte']:.4f} bits per byte, "
        self.note(
            f"step {record['step']}/{self._total}  evaluation: {score}loss {record['eval_loss']:.4f}  ({seconds:.1f} s)"
        )

    def note(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if not self._quiet:  # asked first, since rich is slow even when it prints nothing
            self._console.print(text, markup=False)

    def write(self, text: str) -> None:
        """Print text without ending the line."""
        self._console.print(text, end="", markup=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
