"""Renders a conversation by a Jinja chat template and finds the answers of the assistant in the result.

The environment is the one that transformers documents for chat templates: sandboxed, `trim_blocks`, `lstrip_blocks`,
`break` and `continue`, `raise_exception`, `tojson`, `{% generation %}`. There is no clock (`strftime_now`), since a
corpus must not depend on the day it is made. A template that asks whether there is one goes without; one that calls it
all the same is refused.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import Any, NoReturn

from deltaformer_jax.data.chat.format import ASSISTANT, ChatFormat, bears_loss
from deltaformer_jax.data.sources import Unreadable

_INSTALL = 'chat templates need the package jinja2: install the extra "chat", or take --chat plain'


class Template:
    """A compiled template. Raises ValueError, naming the file, for one that is not Jinja."""

    def __init__(self, found: ChatFormat):
        try:
            import jinja2
        except ModuleNotFoundError:
            raise ModuleNotFoundError(_INSTALL) from None

        self._where, self._variables = found.where, found.variables
        self._begin, self._end = (f"<{secrets.token_hex(16)}>" for _ in range(2))
        environment = _environment(self._begin, self._end)
        try:
            self._template = environment.from_string(found.template)
        except jinja2.TemplateError as error:
            raise ValueError(f"{found.where}: not a chat template in Jinja: {error}") from None
        self._marks = "generation" in {name for _, kind, name in environment.lex(found.template) if kind == "name"}

    def pieces(
        self, messages: list[dict[str, Any]], where: str, specials: Iterable[str], prompt: bool = False
    ) -> list[tuple[str, bool]]:
        """The rendered text in pieces, each with whether it is an answer that bears loss. `prompt`: the text up to the
        answer that is to come, which `add_generation_prompt` begins.

        An answer is what a block `{% generation %}` contains. In a template without such blocks, the answer of message
        i is what rendering the messages up to i adds to the messages before it with `add_generation_prompt`; it ends
        with the last name of a special token in it (`specials`), the end token, or where the message ends if it has
        none. Raises Unreadable, naming `where`, for a conversation that the template refuses, that has no answer, or
        that has calls of tools which the template does not write, and ValueError, naming the template, for a template
        whose answers cannot be found in this way.
        """
        self._check_calls(messages, where)
        if self._marks:
            pieces = self._marked(messages, where, prompt)
        else:
            pieces = self._compared(messages, where, tuple(specials), prompt)
        if not prompt and not any(answer for _, answer in pieces):
            raise Unreadable(f"{where}: the chat template renders no answer of role {ASSISTANT!r}; leave it out")
        return pieces

    def prompt(self, messages: list[dict[str, Any]], where: str) -> str:
        """The rendered text with `add_generation_prompt`, as transformers' apply_chat_template makes it.

        Raises Unreadable, naming `where`, for a conversation that the template refuses, or calls of tools that it does
        not write.
        """
        self._check_calls(messages, where)
        return self._render(messages, where, prompt=True).replace(self._begin, "").replace(self._end, "")

    def _render(self, messages: list[dict[str, Any]], where: str, prompt: bool = False) -> str:
        messages = [{name: x for name, x in message.items() if name != "weight"} for message in messages]
        try:
            return self._template.render(messages=messages, add_generation_prompt=prompt, **self._variables)
        except Exception as error:  # whatever the template's expressions raise
            if str(error) == "'strftime_now' is undefined":
                raise ValueError(
                    f"{self._where}: calls strftime_now, and texts must not depend on the day they are made; put a "
                    "date in its place in a copy, and name that with --chat FILE"
                ) from None
            raise Unreadable(f"{where}: the chat template {self._where} refuses it: {error}") from None

    def _check_calls(self, messages: list[dict[str, Any]], where: str) -> None:
        """Without this, an answer that is only a call of a tool would be trained as an empty one."""
        if not any(message.get("tool_calls") for message in messages):
            return
        whole = self._render(messages, where)
        for i, message in enumerate(messages):
            if not message.get("tool_calls"):
                continue
            bare = {name: x for name, x in message.items() if name != "tool_calls"}
            try:
                written = self._render([*messages[:i], bare, *messages[i + 1 :]], where) != whole
            except Unreadable:  # the template asks for them
                written = True
            if not written:
                raise Unreadable(
                    f"{where}: message {i + 1} has tool_calls, which the chat template {self._where} does not write; "
                    "leave it out, or name a template that writes them with --chat FILE"
                )

    def _marked(self, messages: list[dict[str, Any]], where: str, prompt: bool) -> list[tuple[str, bool]]:
        first, *others = self._render(messages, where, prompt).split(self._begin)
        pieces = [(first, False)]
        loss = [bears_loss(message) for message in messages if message["role"] == ASSISTANT]
        if all(loss):
            loss = [True] * len(others)
        elif len(loss) != len(others):
            self._refuse(f"has {len(others)} {{% generation %}} blocks for {len(loss)} answers with weights", where)
        for part, bears in zip(others, loss):
            answer, end, rest = part.partition(self._end)
            if not end or self._end in rest:
                self._refuse("has {% generation %} blocks inside one another", where)
            pieces += [(answer, bears), (rest, False)]
        return [(text, answer) for text, answer in pieces if text]

    def _compared(
        self, messages: list[dict[str, Any]], where: str, specials: tuple[str, ...], asking: bool
    ) -> list[tuple[str, bool]]:
        whole, pieces, done = self._render(messages, where, asking), [], 0
        for i, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            if not i:
                raise Unreadable(f"{where}: begins with a message of role {ASSISTANT!r}, which answers nothing")
            before = self._render(messages[:i], where)
            prompt = self._render(messages[:i], where, prompt=True)
            after = self._render(messages[: i + 1], where)
            if not (prompt.startswith(before) and after.startswith(prompt) and whole.startswith(after)):
                self._refuse(
                    f"renders messages 1 to {i + 1} in another way when others follow them or an answer", where
                )
            answer = after[len(prompt) :]
            content = message["content"].strip()
            if prompt == before and not answer.lstrip().startswith(content):
                self._refuse("writes something before an answer, and does not do so for add_generation_prompt", where)
            length = max((place + len(name) for name in specials if (place := answer.rfind(name)) >= 0), default=0)
            length = length if length >= len(content) else len(answer)
            pieces += [(whole[done : len(prompt)], False), (answer[:length], bears_loss(message))]
            done = len(prompt) + length
        return [(text, answer) for text, answer in [*pieces, (whole[done:], False)] if text]

    def _refuse(self, why: str, where: str) -> NoReturn:
        raise ValueError(
            f"{self._where}: {why} ({where}), so the answers cannot be told from the rest; put them in "
            "{% generation %} blocks, or name another template with --chat FILE"
        )


def _environment(begin: str, end: str) -> Any:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`: puts marks around what it contains."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{begin}{caller()}{end}"

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
