"""A conversation as tokens and the mask of those that the assistant says."""

from __future__ import annotations

import functools
import json
from typing import NamedTuple

import numpy as np

from deltaformer_jax.data.chat.format import ASSISTANT, ChatFormat, bears_loss
from deltaformer_jax.data.sources import Conversation, Unreadable
from deltaformer_jax.data.tokenizer import Tokenizer


class Encoded(NamedTuple):
    """tokens: [n], integers. mask: bool [n], True at the tokens of answers that bear loss.

    text: the pieces, as JSON in UTF-8.

    text_bytes: the length of the rendered text in UTF-8.
    """

    tokens: np.ndarray
    mask: np.ndarray
    text: bytes
    text_bytes: int


class Encoder:
    """Encodes conversations with one tokenizer in one form. The template is compiled once."""

    def __init__(self, tokenizer: Tokenizer, form: ChatFormat):
        self._tokenizer, self._form = tokenizer, form

    @functools.cached_property
    def _template(self):
        from deltaformer_jax.data.chat.template import Template

        return Template(self._form)

    def encode(self, conversation: Conversation) -> Encoded:
        """The pieces of the rendered text are encoded one by one, so that no token is half of an answer.

        This is also how a conversation is encoded that goes on from a prompt. Raises Unreadable, naming the line or
        row, for a conversation that cannot be rendered, has no answer that bears loss, has calls of tools that are not
        rendered, or names a special token in a message.
        """
        answers = [message for message in conversation.messages if message["role"] == ASSISTANT]
        if answers and not any(map(bears_loss, answers)):
            raise Unreadable(f"{conversation.where}: all answers have weight 0, so nothing bears loss; leave it out")
        pieces = self._pieces(conversation)
        arrays = self._arrays(pieces, conversation.where)
        mask = np.repeat([answer for _, answer in pieces], [len(array) for array in arrays])
        size = sum(len(text.encode()) for text, _ in pieces if text)
        return Encoded(np.concatenate(arrays), mask, json.dumps(pieces).encode(), size)

    def prompt(self, conversation: Conversation) -> tuple[list[int], str]:
        """(tokens, text) of a conversation up to the answer that is to come.

        They are the tokens that training puts before such an answer, end-of-text first; or, for a model that was
        trained elsewhere (`ChatFormat.ends`), the tokens of the text that its template renders. Raises as `encode`, and
        for a conversation whose last message is an answer.
        """
        if conversation.messages[-1]["role"] == ASSISTANT:
            raise Unreadable(f"{conversation.where}: ends with a message of role {ASSISTANT!r}; leave that one out")
        if self._form.ends:
            self._check_specials(conversation)
            text = self._template.prompt(conversation.messages, conversation.where)
            (tokens,) = self._arrays([(text, False)], conversation.where)
            return tokens.tolist(), text
        pieces = self._pieces(conversation, prompt=True)
        tokens = np.concatenate(self._arrays([(None, False), *pieces], conversation.where))
        return tokens.tolist(), "".join(text or "" for text, _ in pieces)

    @functools.cached_property
    def end(self) -> int:
        """The token that ends an answer: the last one of an answer if it is a special one, else end-of-text."""
        talk = [{"role": "user", "content": "Hi"}, {"role": ASSISTANT, "content": "Hello"}]
        found = self.encode(Conversation(talk, "a conversation of two messages"))
        last = int(found.tokens[found.mask][-1])
        special = {token.id for token in self._tokenizer.special_tokens.values()}
        return last if last in special else self._tokenizer.eot

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return self._form.ends or (self.end,)

    def _pieces(self, conversation: Conversation, prompt: bool = False) -> list[tuple[str | None, bool]]:
        if self._form.template is None:
            return _plain(conversation, prompt)
        self._check_specials(conversation)
        specials = self._tokenizer.special_tokens
        return self._template.pieces(conversation.messages, conversation.where, specials, prompt)

    def _check_specials(self, conversation: Conversation) -> None:
        specials = self._tokenizer.special_tokens
        for message in conversation.messages:
            if name := next((name for name in specials if name in message["content"]), None):
                raise Unreadable(
                    f"{conversation.where}: a message of role {message['role']!r} holds {name!r}, which would "
                    "become a special token; leave it out or write it in another way"
                )

    def _arrays(self, pieces: list[tuple[str | None, bool]], where: str) -> list[np.ndarray]:
        plain = self._form.template is None
        encode = self._tokenizer.encode_array if plain else self._tokenizer.encode_with_specials
        eot = np.array([self._tokenizer.eot], np.int64)
        try:
            return [eot if text is None else encode(text) for text, _ in pieces]
        except UnicodeEncodeError:
            raise Unreadable(f"{where}: holds half a surrogate pair, which is no character") from None


def _plain(conversation: Conversation, prompt: bool) -> list[tuple[str | None, bool]]:
    """Pieces of text, None for end-of-text, each with whether it bears loss (`ChatFormat`)."""
    pieces: list[tuple[str | None, bool]] = []
    for message in conversation.messages:
        if message.get("tool_calls"):
            raise Unreadable(
                f"{conversation.where}: a message has tool_calls, which the plain form does not write; leave it out, "
                "or name a chat template that writes them with --chat"
            )
        head, loss = f"{message['role']}:\n", bears_loss(message)
        end = None if message["role"] == ASSISTANT else "\n\n"
        pieces += [(head, False), (message["content"], loss), (end, loss)]
    if prompt:
        pieces.append((f"{ASSISTANT}:\n", False))
    elif not any(loss for _, loss in pieces):
        raise Unreadable(f"{conversation.where}: has no message of role {ASSISTANT!r}; leave it out")
    return [(text, answer) for text, answer in pieces if text != ""]
