"""What all pictures share: colours and dashes that tell lines apart, a title that is a sentence, named references."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Sequence
from typing import Any

# Okabe and Ito's colours, which colour-blind eyes tell apart, without their yellow, which is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
WIDTHS = (2.2, 1.7, 1.4, 1.4)  # of each kind of line, so that what lies below shows beside and between
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#555555"  # of references and captions


def line_styles(names: Sequence[str], black: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Name -> colour, linestyle, linewidth and zorder for `plot`: colour and dashes are different for up to 28 names.

    Dashed lines are thinner and lie upon those with fewer gaps, so that of two equal curves both are seen. The names
    in `black`, those compared with, are black and differ in their dashes; no other name is black then.
    """
    colours = [colour for colour in COLOURS if not black or colour != "#000000"]
    others = [name for name in names if name not in black]
    count = len(colours)
    chosen = {name: (colours[i % count], (i % count + i // count) % 4) for i, name in enumerate(others)}
    chosen |= {name: ("#000000", i % 4) for i, name in enumerate(name for name in names if name in black)}
    return {
        name: {
            "color": colour,
            "linestyle": DASHES[dashes],
            "linewidth": WIDTHS[dashes],
            "zorder": 2 + dashes / 10,
        }
        for name, (colour, dashes) in ((name, chosen[name]) for name in names)
    }


def legend_entries(panels: Iterable[Any]) -> dict[str, Any]:
    """Label -> the first line or bar that has it, in the order of the panels."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            found.setdefault(label, handle)
    return found


def explain(picture: Any, title: str, caption: str = "") -> None:
    """A title, which says in a sentence what the picture shows, and below the panels what one needs to read it."""
    width = picture.get_figwidth()
    title = textwrap.fill(title, int(9.3 * width))
    picture.suptitle(title, x=0.008, ha="left", fontsize=12.5, fontweight="bold")
    if caption:
        caption = "\n".join(textwrap.fill(line, int(14.5 * width)) for line in caption.splitlines())
        picture.supxlabel(caption, x=0.008, ha="left", fontsize=9, color=GREY, linespacing=1.3)


def reference(axes: Any, value: float, text: str, upright: bool = False) -> None:
    """A grey line across the axes, its name at its right end beside them (`upright`: at its upper end above them)."""
    line, at, place, shift = (
        (axes.axvline, (value, 1), ("data", "axes fraction"), (0, 3))
        if upright
        else (axes.axhline, (1, value), ("axes fraction", "data"), (4, 0))
    )
    line(value, color=GREY, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0.5)
    axes.annotate(
        text,
        at,
        xycoords=place,
        xytext=shift,
        textcoords="offset points",
        ha="center" if upright else "left",
        va="bottom" if upright else "center",
        fontsize=8,
        color=GREY,
        annotation_clip=False,
    )


def plain(axes: Any, title: str = "", grid: str = "both", room: float = 8) -> None:
    """A panel without its upper and right edge, a faint grid, and its title on the left, `room` points above it."""
    axes.set_title(title, loc="left", fontsize=10, pad=room)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
