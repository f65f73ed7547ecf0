"""The tokens of a tokenizer that consist of given characters, such as separators."""

from deltaformer_jax.data.tokenizer import Tokenizer


def tokens_of(characters: str, tokenizer: Tokenizer) -> dict[int, str]:
    """{id: text}, in ascending order of ids, of the tokens whose text consists of these characters alone."""
    wanted, texts = set(characters), enumerate(map(_text, tokenizer.pieces))
    return {i: text for i, text in texts if text and wanted.issuperset(text)}


def _text(piece: bytes | None) -> str:
    """ "" for a part of a character, and for a token without text."""
    try:
        return (piece or b"").decode("utf-8")
    except UnicodeDecodeError:
        return ""
