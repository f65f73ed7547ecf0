"""Incremental decoding of token ids into text: only whole characters, and no part of a stop string."""

from collections.abc import Sequence

from deltaformer_jax.data import Tokenizer


class TextStream:
    """Decodes token ids pushed one at a time. The text ends at one of the tokenizer's `ends` or before the first stop
    string.

    `push(token)` returns the new text that is final. It holds back the bytes of an incomplete character, and a tail of
    the text that may be the beginning of a stop string. `finish` is None while the text goes on, then "end_of_text" or
    "stop"; later tokens are ignored. Raises ValueError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        if isinstance(stops, str) or not all(isinstance(stop, str) for stop in stops):
            raise TypeError(f"stop = {stops!r:.60}: give a list of texts")
        if not all(stops):
            raise ValueError("stop: an empty text; leave it out")
        self._decoder = tokenizer.stream()
        self.ends = tokenizer.ends
        self._stops = tuple(stops)
        self._held = ""
        self.finish: str | None = None

    def push(self, token: int) -> str:
        if self.finish:
            return ""
        if token in self.ends:
            rest = self.end()
            self.finish = self.finish or "end_of_text"
            return rest
        return self._release(self._decoder.push(token))

    def end(self) -> str:
        """The text that was held back, to be called after the last token. An incomplete character gives U+FFFD."""
        text = self._release(self._decoder.end()) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        if self.finish:
            return ""
        text = self._held + text
        self._held = ""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.finish = "stop"
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest tail of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
