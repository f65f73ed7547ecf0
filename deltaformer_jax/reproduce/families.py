"""The table of experiments that run several families of models, each with several variants of settings."""

from __future__ import annotations

from typing import Any


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per (family, variant): the number of runs, their worst and best last accuracy, when each was solved."""
    lines: dict[tuple[str, str], list] = {}
    for record in done:
        settings, result = record["settings"], record["result"]
        key = (settings["family"], settings["variant"])
        lines.setdefault(key, []).append((result["accuracy"], result["solved_at"][-1], record["seconds"]))
    return [
        {
            "model": family,
            "settings": variant,
            "runs": len(runs),
            "worst": f"{min(run[0] for run in runs):.4f}",
            "best": f"{max(run[0] for run in runs):.4f}",
            "0.995 at step": ", ".join(str(run[1] or "–") for run in runs),
            "seconds": f"{sum(run[2] for run in runs):.0f}",
        }
        for (family, variant), runs in lines.items()
    ]
