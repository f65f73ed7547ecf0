"""What a model's settings say about tokens, filled in from the tokenizer: their number, and which are separators."""

from __future__ import annotations

import dataclasses

from deltaformer_jax.config import Config
from deltaformer_jax.data import Tokenizer
from deltaformer_jax.data.tokenizer.characters import tokens_of


def with_vocabulary(config: Config, tokenizer: Tokenizer) -> Config:
    """The config with model.vocab_size filled in, and model.separator_tokens if there are model.separators.

    A size larger than the tokenizer's is kept (it may be rounded up). A smaller one raises ValueError, as do separators
    that the tokenizer does not have and separator_tokens that are given besides and are others.
    """
    model = config.model
    if 0 < model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size = {model.vocab_size}: the tokenizer has {tokenizer.vocab_size} tokens; set 0 to use that"
        )
    filled = {"vocab_size": model.vocab_size or tokenizer.vocab_size}
    if model.separators:
        filled["separator_tokens"] = separator_tokens(model.separators, tokenizer)
        if model.separator_tokens not in ((), filled["separator_tokens"]):
            raise ValueError(
                f"model.separator_tokens = {model.separator_tokens!r}: the tokenizer's of model.separators = "
                f"{model.separators!r} are {filled['separator_tokens']!r}; give one of the two fields"
            )
    return dataclasses.replace(config, model=dataclasses.replace(model, **filled))


def separator_tokens(separators: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids of the tokens whose text consists of characters of `separators` alone, in ascending order.

    Raises ValueError, naming the characters, if some are in no such token.
    """
    found = tokens_of(separators, tokenizer)
    if missing := set(separators).difference(*found.values()):
        raise ValueError(
            f"model.separators = {separators!r}: no token of the tokenizer ({tokenizer.kind}) consists of "
            f"{', '.join(map(repr, sorted(missing)))}, alone or with the others; leave out what it does not have"
        )
    return tuple(found)
