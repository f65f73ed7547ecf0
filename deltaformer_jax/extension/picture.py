"""The picture of an extension: loss by position, recall by distance, drift by layer."""

from __future__ import annotations

from typing import Any

from deltaformer_jax.plot.style import COLOURS, explain, plain, reference


def picture(found: dict[str, Any], name: str) -> Any:
    """A matplotlib Figure of `report.compared`'s measures."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(14, 4.8), layout="constrained")
    loss, recall, drift = drawn.subplots(1, 3)
    short, long = found["short_length"], found["long_length"]
    for colour, when in zip(COLOURS, ("before", "after")):
        label = f"{when}, base {found[when]['rope_base']:g}" if found[when]["rope_base"] else when
        reports = found[when]["long"]["by_position"]
        loss.plot([one["to"] for one in reports], [one["loss"] for one in reports], "o-", color=colour, label=label)
        points = found[when]["recall"]
        recall.plot([one["distance"] for one in points], [one["saved"] for one in points], "o-", color=colour)
    for axes in (loss, recall):
        axes.set_xscale("log", base=2)
        reference(axes, short, "old context", upright=True)
    loss.set(xlabel="position in the text", ylabel="nats a token")
    recall.set(xlabel="tokens between a passage and its return", ylabel="nats a token saved")
    recall.axhline(0, color="#555555", linewidth=0.8)
    loss.legend(frameon=False, fontsize=9)
    layers = range(len(found["drift"]["similarity"]))
    drift.plot(layers, [1 - value for value in found["drift"]["similarity"]], "o-", color=COLOURS[0])
    drift.set(xlabel="layer", ylabel="1 − mean cosine with the model before", ylim=(0, None))
    plain(loss, "Loss by position")
    plain(recall, "Recall of a passage")
    plain(drift, "Drift on short texts")
    before, after = (found[when]["short"]["loss"] for when in ("before", "after"))
    explain(drawn, f"{name}: {short} to {long:,} tokens; texts of {short}: {before:.3f} nats before, {after:.3f} after")
    return drawn
