"""Reading another project's config.json field by field: every field is taken, known to have no effect, or refused."""

from __future__ import annotations

from typing import Any

# Fields of every config of transformers that say nothing about the model's function.
EVERYWHERE = frozenset(
    """_name_or_path architectures auto_map attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id
    id2label initializer_range is_decoder is_encoder_decoder label2id max_position_embeddings model_type
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp problem_type return_dict
    torch_dtype transformers_version use_cache""".split()
)

_REQUIRED = object()


class Fields:
    """The fields of one config.json. `finish` raises one ValueError with all that has no equivalent here."""

    def __init__(self, values: dict[str, Any], ignored: str = ""):
        self._values, self._rest = values, set(values) - EVERYWHERE - set(ignored.split())
        self._problems: list[str] = []

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field's value; `default` if it is absent or null."""
        self._rest.discard(name)
        value = self._values.get(name)
        if value is None:
            if default is _REQUIRED:
                self._problems.append(f"{name}: missing")
                return 1
            return default
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a value other than these. The first is the one that an absent field stands for."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            self.refuse(f"{name} = {value!r}: only {' or '.join(map(repr, allowed))} has an equivalent here")

    def refuse(self, problem: str) -> None:
        self._problems.append(problem)

    def finish(self) -> None:
        """Raise ValueError if a field was refused, or if one is left that nothing took and that is switched on."""
        unknown = [name for name in sorted(self._rest) if self._values[name] not in (None, False)]
        problems = self._problems + [f"{name} = {self._values[name]!r}: is not known here" for name in unknown]
        if problems:
            raise ValueError("config.json: " + "; ".join(problems))
