"""What a model reads before a text: end-of-text if it was trained here, else what its own tokenizer puts there."""

from __future__ import annotations

from typing import Any, NamedTuple

# When a tokenizer puts a space before a text: always, or only where the text does not begin with one.
ALWAYS, IF_NONE = "always", "if_none"


class Prefix(NamedTuple):
    """ids: the tokens before every text. first: the token before a text that has none before it but must have one.

    space: "", ALWAYS or IF_NONE. elsewhere: the model was trained elsewhere, and `ids` is what its tokenizer adds.
    """

    ids: tuple[int, ...]
    first: int
    space: str = ""
    elsewhere: bool = False

    def spaced(self, text: str) -> str:
        """`text` after the space."""
        wanted = self.space == ALWAYS or (self.space == IF_NONE and not text.startswith(" "))
        return f" {text}" if wanted and text else text

    def settings(self) -> dict[str, Any]:
        """For JSON; `Prefix.of` is the inverse."""
        return self._asdict() | {"ids": list(self.ids)}

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Prefix:
        return cls(**settings | {"ids": tuple(settings["ids"])})
