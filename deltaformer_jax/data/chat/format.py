"""How a conversation becomes text: a Jinja template, or the plain form."""

from __future__ import annotations

import dataclasses
from typing import Any

PLAIN = "plain"
ASSISTANT = "assistant"  # the role whose messages are answers


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """template: Jinja, or None for the plain form. variables: what the template may name. where: where it was found.

    The plain form of a message is its role, ":" and a line feed, then its content, then two line feeds, or end-of-text
    after an answer of the assistant.
    """

    template: str | None
    variables: dict[str, str] = dataclasses.field(default_factory=dict)
    where: str = PLAIN

    @classmethod
    def of(cls, settings: dict[str, Any], where: str) -> ChatFormat:
        """The inverse of `settings`."""
        return cls(settings.get("template"), settings.get("variables", {}), where)

    def settings(self) -> dict[str, Any]:
        """What decides the tokens, for the manifest of a corpus."""
        return {"plain": 1} if self.template is None else {"template": self.template, "variables": self.variables}
