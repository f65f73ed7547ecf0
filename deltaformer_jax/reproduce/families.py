"""The table and the verdict of experiments whose cells are runs of a few families, each in several settings."""

from __future__ import annotations

from typing import Any

from deltaformer_jax.reproduce.pictures import best_first, listed


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


def who_solves(done: list[dict[str, Any]], does: str) -> str:
    """A sentence on the families "DeltaFormer, κ₁" of one layer and "Transformer, N layers": which ones have a run that
    was solved. `does` is what they then do, in the third person."""
    scores = best_first(done)
    solved = {r["settings"]["family"] for r in done if r["result"]["solved_at"][-1] is not None}
    similarities = [name.split(", ")[1] for name in scores if name in solved and name.startswith("DeltaFormer")]
    transformers = [name for name in scores if name.startswith("Transformer")]
    depths = [name.split(", ")[1] for name in transformers if name in solved]
    if not similarities and not depths:
        name, runs = next(iter(scores.items()))
        return f"No model here {does}; the best is {name}, with an accuracy of {max(runs):.3f}"
    parts = []
    if similarities:
        parts.append(f"One layer of DeltaFormer with κ₁ = {listed(similarities, 'or')} {does}")
    elif len(transformers) < len(scores):
        parts.append(f"No DeltaFormer here {does}")
    if depths:
        parts.append(f"a Transformer of {listed(depths, 'or')} {does}")
    elif transformers:
        parts.append("no Transformer here does")
    return "; ".join(parts)
