"""Scalings of transformers' rotary embedding (`rope_type`), to and from `model.rope_scaling`."""

from __future__ import annotations

from typing import Any

from deltaformer_jax.config.rope_scaling import TURNS, magnitude, parse
from deltaformer_jax.interop.fields import Fields

ORIGINAL = "original_max_position_embeddings"
# rope_type -> the fields that hold the numbers of our form, in its order.
NUMBERS = {
    "linear": ("factor",),
    "yarn": ("factor", ORIGINAL),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
}
# Fields of yarn whose usual values our form has: its borders, and the factor of cosines that follows from the scaling.
_YARN = {"beta_fast": TURNS[0], "beta_slow": TURNS[1], "truncate": True}
FIELDS = " ".join(
    dict.fromkeys(field for fields in (*NUMBERS.values(), _YARN, ("attention_factor",)) for field in fields)
)


def read_scaling(fields: Fields, name: str, said: dict[str, Any]) -> str:
    """`model.rope_scaling` of an object of config.json, `name`, with a rope_type. What has no equivalent is refused."""
    kind = said.get("rope_type", said.get("type", "default"))
    extra = said.keys() & {*FIELDS.split()}
    if kind == "default":
        for field in sorted(extra):
            fields.refuse(f"{name}.{field} = {said[field]!r}: is not known here without a rope_type that has it")
        return "none"
    if kind not in NUMBERS:
        known = ", ".join(map(repr, ("default", *NUMBERS)))
        fields.refuse(f"{name}.rope_type = {kind!r}: only {known} have an equivalent here")
        return "none"
    # Its class takes yarn's original context from max_position_embeddings where the object does not say it.
    usual = {ORIGINAL: fields.take("max_position_embeddings", None)} if kind == "yarn" else {}
    numbers = [said.get(field, usual.get(field)) for field in NUMBERS[kind]]
    text = f"{kind}:{','.join(map(repr, numbers))}"
    try:
        scaling = parse(text)
    except ValueError as error:
        fields.refuse(
            f"{name} = {said!r}: {error}" if None not in numbers else f"{name}: {_missing(kind, said)} missing"
        )
        return "none"
    own = _YARN | {"attention_factor": magnitude(scaling)} if kind == "yarn" else {}
    for field in sorted(extra - {*NUMBERS[kind]}):
        if field not in own or abs(said[field] - own[field]) > 1e-6:
            fields.refuse(f"{name}.{field} = {said[field]!r}: has no equivalent here beside rope_type = {kind!r}")
    return text


def _missing(kind: str, said: dict[str, Any]) -> str:
    return ", ".join(field for field in NUMBERS[kind] if field not in said)


def say_scaling(text: str) -> dict[str, Any]:
    """The fields of a `model.rope_scaling` in rope_parameters. "ntk" has none: it is written as no scaling."""
    rule, numbers = parse(text)
    if rule not in NUMBERS:
        return {"rope_type": "default"}
    whole = lambda number: int(number) if number == int(number) else number
    of = {field: whole(number) if field == ORIGINAL else number for field, number in zip(NUMBERS[rule], numbers)}
    return {"rope_type": rule} | of
