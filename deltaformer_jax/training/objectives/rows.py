"""The rows that a batch has beside those of data.sequence_length, for the objectives "mixed" and "longred".

With B rows of T tokens, a cycle a, b, c, and n the rows that one part of a batch needs so that each device has as many:

    short   rows of short_length S tokens             B T b / (a S) of them
    s2l     rows of the teacher's length L tokens     B T c / (a L) of them

each number rounded to the nearest multiple of n, and at least n.
"""

from __future__ import annotations

from typing import NamedTuple

from etils import epath
from jax.sharding import Mesh

from deltaformer_jax.config import Config
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.sharding import CONTEXT_AXIS
from deltaformer_jax.sharding.mesh import rows

SHORT, STRETCHED = "short", "s2l"


class Rows(NamedTuple):
    """`number` rows of `length` tokens a step, of the text `data`; "": that of data.path."""

    data: str
    length: int
    number: int


def rows_beside(config: Config, mesh: Mesh) -> dict[str, Rows]:
    """The extra rows of each batch by their names; {} for other objectives.

    Raises ValueError, naming the field, for lengths that do not fit the mesh or the teacher.
    """
    objective = config.objective
    if objective.name not in ("mixed", "longred"):
        return {}
    long, short, stretched = objective.shares()
    tokens = config.data.batch_size * config.data.sequence_length
    multiple = rows(mesh) * config.optimizer.accumulation_steps
    count = lambda share, length: multiple * max(1, round(tokens * share / (long * length * multiple)))
    found = {}
    if objective.name == "mixed" or objective.alpha_short:
        length = objective.short_length
        found[SHORT] = Rows(objective.short_data, length, count(short, length))
    if objective.name == "longred":
        original = teacher_length(config)
        if objective.short_length > original:
            raise ValueError(
                f"objective.short_length = {objective.short_length}: the teacher was trained on rows of {original} "
                "tokens; give no more than that"
            )
        if config.data.sequence_length < original:
            raise ValueError(
                f"data.sequence_length = {config.data.sequence_length}: shorter than the teacher's {original}; give "
                "the length that the context is extended to"
            )
        if objective.alpha_s2l:
            found[STRETCHED] = Rows(objective.s2l_data, original, count(stretched, original))
    context = mesh.shape[CONTEXT_AXIS]
    for name, one in found.items():
        if one.length % context:
            raise ValueError(
                f"objective: its {name} rows have {one.length} tokens, no multiple of mesh.context = {context}"
            )
    return found


def teacher_length(config: Config) -> int:
    """The tokens of a row that the teacher was trained on."""
    return teacher_run(config).config.data.sequence_length


def teacher_run(config: Config) -> Saved:
    """The teacher's config. Raises ValueError or FileNotFoundError, naming objective.teacher_workdir."""
    try:
        return Saved.read(epath.Path(config.objective.teacher_workdir))
    except (ValueError, OSError) as error:
        text = str(error).removeprefix("--workdir ")
        raise type(error)(f"objective.teacher_workdir = {text}") from None
