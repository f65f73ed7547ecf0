r"""Lines end at \n or \r\n and nowhere else; a byte order mark is no text."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaformer_jax.config.lines import lines
from deltaformer_jax.sample import read_prompts

NO_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r"  # where str.splitlines would cut
line = st.text(st.sampled_from("a é\ufeff" + NO_ENDS), max_size=5).filter(lambda text: not text.endswith("\r"))


@given(st.lists(line), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_lines(texts, end, ended):
    content = end.join(texts) + (end if ended and texts else "")
    expected = texts if ended or not texts or texts[-1] else texts[:-1]
    assert lines(content) == expected


@pytest.mark.parametrize("place", ["file", "-"])
def test_prompts(place, tmp_path, monkeypatch):
    content = f"\ufeffalpha\r\nbe{NO_ENDS}ta\n\ngamma".encode()
    (tmp_path / "prompts").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = read_prompts(["first"], place if place == "-" else str(tmp_path / "prompts"))
    assert found == ["first", "alpha", f"be{NO_ENDS}ta", "", "gamma"]
