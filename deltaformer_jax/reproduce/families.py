"""The table of experiments whose cells are runs of a few families of models, each in several variants of settings."""

from __future__ import annotations

from typing import Any


def rows(done: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for the runs of each (family, variant): how many, their last accuracies, when they were solved."""
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
