"""The numbers of a record of metrics.jsonl or statistics.jsonl, by the names that curves have."""

from typing import Any

_TAGS = {
    "eval_loss": "evaluation/loss",
    "eval_bits_per_byte": "evaluation/bits_per_byte",
    "eval_accuracy": "evaluation/accuracy",
}


def scalars(record: dict[str, Any]) -> dict[str, int | float]:
    """{"training/loss": 1.5, "gradient_norm/layers.0.mlp.up": 0.1, ...}, without the step and what is no number."""
    named: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            named |= {f"{name}/{part}": number for part, number in value.items()}
        elif name != "step":
            named[_TAGS.get(name, f"training/{name}")] = value
    return {tag: x for tag, x in named.items() if isinstance(x, int | float) and not isinstance(x, bool)}
