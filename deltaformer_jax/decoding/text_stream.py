"""Token ids in, text out as it comes: whole characters, and nothing of a stop string."""

from collections.abc import Sequence

from deltaformer_jax.data import Tokenizer


class TextStream:
    """The text of ids pushed one at a time, up to end-of-text or the first of `stops` to appear in it.

    `push` returns what is certain by now: not the bytes of an unfinished character, and not an end of the text that a
    stop string may begin with. `finish` is None, then "end_of_text" or "stop"; what is pushed after that is ignored.
    ValueError for an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        if not all(stops):
            raise ValueError("stop: an empty text; leave it out")
        self._decoder = tokenizer.stream()
        self._eot = tokenizer.eot
        self._stops = tuple(stops)
        self._held = ""
        self.finish: str | None = None

    def push(self, token: int) -> str:
        if self.finish:
            return ""
        if token == self._eot:
            rest = self.end()
            self.finish = self.finish or "end_of_text"
            return rest
        return self._release(self._decoder.push(token))

    def end(self) -> str:
        """What was held back, when no more tokens come; U+FFFD for an unfinished character."""
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
    """The length of the longest end of `text` that `stop` begins with, all of `stop` excepted."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
