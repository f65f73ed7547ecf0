"""The prompts of a sample, from the flags --prompt and --prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deltaformer_jax.config.lines import lines

if TYPE_CHECKING:  # the program's --help imports this file, and must not import numpy
    from deltaformer_jax.data.sources import Conversation

_LINE = 'a line is {"messages": [{"role": ..., "content": ...}, ...]}'


def read_prompts(prompts: list[str], file: str | None) -> list[str]:
    r"""The texts of --prompt, then the lines of the file of --prompts ("-": stdin); [] if neither is given.

    Only \n and \r\n end a line. A byte order mark is dropped. Raises ValueError or OSError, naming the flag.
    """
    prompts = list(prompts)
    if file is not None:
        try:
            content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            prompts += lines(content.decode("utf-8-sig"))
        except OSError as error:
            raise OSError(f"--prompts {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompts {file}: not UTF-8 (byte {error.start})") from None
    if file is not None and not prompts:
        raise ValueError(f"--prompts {file}: it holds no line")
    for prompt in prompts:
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"--prompt {prompt!a}: not UTF-8") from None
    return prompts


def read_chats(texts: list[str], file: str | None) -> list[Conversation]:
    """The conversations of --chat, each one message of the user, then those of the file of --chats.

    A line of the file is {"messages": [{"role": ..., "content": ...}, ...]}; empty lines are left out. Raises
    ValueError or OSError, naming the flag or the line, also if the last message is empty.
    """
    from deltaformer_jax.data.sources.conversation import Conversation, conversation_of
    from deltaformer_jax.data.sources.record import field_of

    talks = [
        _asking(Conversation([{"role": "user", "content": text}], f"--chat {number}"))
        for number, text in enumerate(texts, 1)
    ]
    if file is None:
        return talks
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise OSError(f"--chats {file}: {error.strerror}") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        where = f"--chats {file}, line {number}"
        if line.strip():
            messages = field_of(line, "messages", where, _LINE)
            talks.append(_asking(conversation_of(messages, "messages", where, _LINE)))
    if not talks:
        raise ValueError(f"--chats {file}: it holds no conversation")
    return talks


def _asking(talk: Conversation) -> Conversation:
    if not talk.messages[-1]["content"].strip():
        raise ValueError(f"{talk.where}: the last message is empty; give what the user says")
    return talk
