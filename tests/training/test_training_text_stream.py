"""Streamed text: cut at the first stop string or end-of-text, whole characters, nothing shown that is taken back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaformer_jax.data import ByteTokenizer, train_bpe
from deltaformer_jax.decoding.text_stream import TextStream

BYTES = ByteTokenizer()
BPE = train_bpe(["abab aabb größer 日本 " * 20], 300)
alphabet = st.text(st.sampled_from("abé日 \n"), max_size=30)


def streamed(tokenizer, ids, stops=()):
    stream = TextStream(tokenizer, stops)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.end()], stream.finish


@settings(max_examples=200)
@given(alphabet, st.lists(st.text(st.sampled_from("abé\n"), min_size=1, max_size=4), max_size=3), st.booleans())
def test_the_text_up_to_the_first_stop(text, stops, bpe):
    tokenizer = BPE if bpe else BYTES
    pieces, finish = streamed(tokenizer, tokenizer.encode(text), stops)
    # The stop whose end comes first, character by character; of several that end there the longest.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    whole = "".join(pieces)
    assert finish == ("stop" if ends else None)
    if not ends:
        assert whole == text
    else:
        assert text.startswith(whole) and not any(stop in whole for stop in stops)
        assert any(text[len(whole) :].startswith(stop) for stop in stops)
        if not bpe:
            assert len(whole) == min(start for end, start in ends if end == min(ends)[0])
    assert "\ufffd" not in whole


def test_nothing_is_held_longer_than_needed():
    pieces, _ = streamed(BYTES, BYTES.encode("ab\nx\n\ny"), ["\n\n"])
    assert pieces == ["a", "b", "", "\nx", "", "", "", ""]
    pieces, _ = streamed(BYTES, BYTES.encode("é"), [])
    assert pieces == ["", "é", ""]


def test_end_of_text_ends_it_and_shows_what_was_held():
    assert streamed(BYTES, [97, 10, 256, 98], ["\n\n"]) == (["a", "", "\n", "", ""], "end_of_text")
    assert streamed(BYTES, [97, 0xC3, 256, 98]) == (["a", "", "\ufffd", "", ""], "end_of_text")
    assert streamed(BYTES, [97, 0xC3]) == (["a", "", "\ufffd"], None)


def test_an_empty_stop():
    with pytest.raises(ValueError, match="stop: an empty text"):
        TextStream(BYTES, ["a", ""])
