"""The output of an evaluation: a progress bar, and a table at the end."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from deltaformer_jax.host.columns import right_aligned


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, shown only on a terminal. Yields a function that advances it by one batch."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    with progress.Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("evaluating", total=total)
        yield lambda: bar.advance(task)


def table(whole: dict[str, Any], by_position: list[dict[str, Any]]) -> str:
    """A text table with one line per range of positions and a last line for all positions together."""
    scores = [name for name in ("accuracy", "bits_per_byte") if whole.get(name) is not None]
    lines = [("position", "tokens", "loss", "perplexity", *(name.replace("_", " ") for name in scores))]
    for report in [*by_position, whole]:
        first, last = report.get("from"), report.get("to")
        name = "all" if first is None else str(first) if first == last else f"{first}-{last}"
        numbers = [report[key] for key in ("loss", "perplexity", *scores)]
        lines.append((name, f"{report['tokens']:,}", *("-" if n is None else f"{n:,.4f}" for n in numbers)))
    return right_aligned(lines)
