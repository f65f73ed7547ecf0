"""The picture of where the time of runs went: a bar for each run, cut into its parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etils import epath

from deltaformer_jax.plot.style import COLOURS, GREY, explain, plain
from deltaformer_jax.training.watch.ledger import DOWN, LOST, PARTS, Spent

# Parts of the training itself have colours; what stands beside it is grey, what was lost is hatched.
_STYLES = {
    "steps": {"color": COLOURS[0]},
    "data wait": {"color": COLOURS[1]},
    "evaluation": {"color": COLOURS[3]},
    "checkpoints": {"color": COLOURS[2]},
    "compiling": {"color": COLOURS[5]},
    "start-up": {"color": "#9A9A9A"},
    "sample": {"color": "#C9C9C9"},
    LOST: {"color": "white", "hatch": "////", "edgecolor": COLOURS[4]},
}
_ORDER = ("steps", "data wait", "evaluation", "checkpoints", "compiling", "start-up", "sample", LOST)
assert set(_ORDER) == {*PARTS, LOST}
_NARROWEST = 0.04  # of the longest bar: a narrower part has no number inside


def figure(spent: dict[str, Spent]) -> Any:
    """A matplotlib Figure. `spent`: by the runs' names, of which there is at least one."""
    from matplotlib.figure import Figure  # with no window system behind it

    drawn = Figure(figsize=(9, 1.9 + 0.62 * len(spent)), layout="constrained")
    panel = drawn.subplots()
    longest = max(one.running for one in spent.values())
    for place, one in enumerate(spent.values()):
        left = 0.0
        for part in _ORDER:
            seconds = one.seconds[part]
            label = part if place == 0 else None
            panel.barh(place, seconds, left=left, height=0.62, label=label, linewidth=0.6, **_STYLES[part])
            if seconds >= _NARROWEST * longest:
                on_hatches = {"color": GREY, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1}}
                look = on_hatches if part == LOST else {"color": "white"}
                share = f"{seconds / one.running:.0%}"
                panel.text(left + seconds / 2, place, share, ha="center", va="center", fontsize=8, **look)
            left += seconds
    panel.set_yticks(range(len(spent)), [f"{name}{_starts(one)}" for name, one in spent.items()])
    panel.invert_yaxis()
    panel.set_xlabel("seconds")
    plain(panel, grid="x")
    drawn.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    explain(drawn, _title(spent))
    return drawn


def _starts(one: Spent) -> str:
    if one.attempts == 1:
        return ""
    down = f", {one.seconds[DOWN]:,.0f} s not running" if one.seconds[DOWN] >= 1 else ""
    return f"\n{one.attempts} starts{down}"


def _title(spent: dict[str, Spent]) -> str:
    lowest = min(spent, key=lambda name: spent[name].seconds["steps"] / spent[name].running)
    share = spent[lowest].seconds["steps"] / spent[lowest].running
    if len(spent) == 1:
        return f"{lowest}: {share:.0%} of {spent[lowest].running:,.0f} s went into training steps"
    return f"Of {len(spent)} runs {lowest} has the smallest share of training steps: {share:.0%}"


def spent_by(names: Sequence[str], found: Sequence[Spent | None], workdirs: Sequence[str]) -> dict[str, Spent]:
    """The runs' ledgers by name. Raises FileNotFoundError for no folder, ValueError for a run without a ledger."""
    for one, workdir in zip(found, workdirs):
        if not epath.Path(workdir).exists():
            raise FileNotFoundError(f"{workdir}: no such folder")
        if one is None:
            raise ValueError(f"{workdir}: has no time.jsonl; only runs that were trained since it is written have one")
    return dict(zip(names, found))
