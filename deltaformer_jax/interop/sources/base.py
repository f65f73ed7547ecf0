"""What a source is: how one model_type of another project says its config and names its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from deltaformer_jax.config import Mixer, ModelConfig
from deltaformer_jax.config.mixer import entry
from deltaformer_jax.interop.fields import Fields
from deltaformer_jax.interop.tables import Row

Shapes = Mapping[str, tuple[int, ...]]


class Source(NamedTuple):
    """read: Fields -> our ModelConfig. write: ModelConfig -> their config.json, as far as it can say it.

    rows: our mixer's name -> the rows of a layer that has it. outside: the names of the embedding, the final norm and
    the logits' kernel. class_name: for `architectures`. former: the rows of older files, from today's; `is_former`
    tells such a file by the shapes of its tensors. dropped: ends of the names of tensors without a function.
    has_positions: whether its config has max_position_embeddings. second_names: whether a layer of a config.json has
    the second of two names for a tensor.
    """

    model_type: str
    class_name: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rows: Mapping[str, list[Row]]
    outside: Mapping[str, str]
    ignored: str = ""
    former: Callable[[list[Row]], list[Row]] | None = None
    is_former: Callable[[Shapes], bool] | None = None
    dropped: tuple[str, ...] = ()
    has_positions: bool = True
    second_names: Callable[[Mapping[str, Any]], bool] | None = None

    def for_shapes(self, shapes: Shapes) -> Source:
        """The source of a file that has tensors of these names and shapes."""
        if self.is_former is None or not self.is_former(shapes):
            return self
        return self._replace(rows={mixer: self.former(rows) for mixer, rows in self.rows.items()})

    def for_config(self, said: Mapping[str, Any]) -> Source:
        """The source that writes the names that its class has with this config.json."""
        if self.second_names is None or not self.second_names(said):
            return self
        return self._replace(rows={mixer: [_turned(row) for row in rows] for mixer, rows in self.rows.items()})


def _turned(row: Row) -> Row:
    """The row with the second of its two names first."""
    if not isinstance(row.theirs, str):
        return row
    return row._replace(theirs="|".join(reversed(row.theirs.split("|"))))


def pattern(layers: list[Mixer]) -> tuple[str | Mixer, ...]:
    """The shortest pattern whose repetition is `layers`, with mixers without overrides as names."""
    plain = [mixer if mixer.overrides else mixer.name for mixer in layers]
    for length in range(1, len(plain) + 1):
        if len(plain) % length == 0 and plain == plain[:length] * (len(plain) // length):
            return tuple(plain[:length])
    return tuple(plain)


def layers(config: ModelConfig) -> list[Mixer]:
    """The mixer of every layer."""
    return [entry(config.mixers[n % len(config.mixers)]) for n in range(config.num_layers)]


def setting(config: ModelConfig, mixer: Mixer, name: str) -> Any:
    """The value of a field in one layer: the entry's own, or the config's."""
    return dict(mixer.overrides).get(name, getattr(config, name))
