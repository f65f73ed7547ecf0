"""Sources: any size and cut gives the same documents, and whatever a parser raises has a place.

The sizes above which a document is not held are made small here; that memory stays bounded at the real ones is measured
at the end.
"""

import gzip
import itertools
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaformer_jax.data import build, prepare_corpus, shards, train_bpe
from deltaformer_jax.data.prepare import PROGRAM, main
from deltaformer_jax.data.sources import Unreadable, long_record, open_source, parquet, units
from deltaformer_jax.data.sources.content import decoded, split
from deltaformer_jax.data.sources.long_record import long_text
from deltaformer_jax.data.sources.record import field_of, text_of

BPE = train_bpe(["hello größer 日本 world\n" * 20], 300)


@pytest.fixture
def small(monkeypatch):
    """Nearly every document is a long one."""
    monkeypatch.setattr(units, "UNIT_BYTES", 200)
    monkeypatch.setattr(units, "LONG", 300)
    monkeypatch.setattr("deltaformer_jax.data.sources.content.BLOCK", 64)
    monkeypatch.setattr(long_record, "_LONG_STRING", 20)
    monkeypatch.setattr(long_record, "_BLOCK", 50)
    monkeypatch.setattr(parquet, "_SMALL_GROUP", 0)


def parts_of(content, cuts):
    places = [0, *sorted(cut % (len(content) + 1) for cut in cuts), len(content)]
    return [content[a:b] for a, b in itertools.pairwise(places)]


CUTS = st.lists(st.integers(0, 200), max_size=6)


@given(st.text("ab|", max_size=60), st.sampled_from(["", "|", "||", "ab|a"]), CUTS)
def test_split_is_that_of_str(text, separator, cuts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "LONG", 5)
        found, held = [], ""
        for part, ends in split(parts_of(text, cuts), separator) if cuts else split([text], separator):
            held += part
            if ends:
                found, held = [*found, held], ""
    assert held == "" and found == (text.split(separator) if separator else [text])


@given(st.binary(max_size=12) | st.text("a\ufeffé日🙂", max_size=12).map(str.encode), CUTS)
def test_decoded_is_decode(content, cuts):
    try:
        expected = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        with pytest.raises(Unreadable, match=rf"a\.txt: not UTF-8 \(byte {error.start}\)"):
            list(decoded(parts_of(content, cuts), "a.txt"))
    else:
        assert "".join(decoded(parts_of(content, cuts), "a.txt")) == expected


VALUES = st.recursive(
    st.none() | st.integers() | st.text('a"\\\n\ud83d\ude00é🙂\x00', max_size=40),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('text\\"{}', max_size=30), inner, max_size=3),
    max_leaves=6,
)
DAMAGE = st.none() | st.tuples(
    st.integers(0, 300), st.sampled_from([b"", b'"', b"\\", b"\n", b"}", b"\xff", b"\\ud800"])
)


@settings(max_examples=300)
@given(st.dictionaries(st.just("text") | st.text('a"', max_size=3), VALUES, max_size=4), st.booleans(), CUTS, DAMAGE)
def test_a_long_record_is_what_json_reads(record, ascii, cuts, damage):
    line = json.dumps(record, ensure_ascii=ascii).encode("utf-8", "replace")
    if damage:
        place = damage[0] % (len(line) + 1)
        line = line[:place] + damage[1] + line[place + 1 :]
    try:
        expected = text_of(field_of(line, "text", "here"), "text", "here")
    except Unreadable:
        expected = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_record, "_LONG_STRING", 10)
        patch.setattr(long_record, "_BLOCK", 16)
        try:
            found = "".join(long_text(iter(parts_of(line, cuts)), "text", "here"))
        except Unreadable as error:
            assert str(error).startswith("here: ")
            found = None
    assert found == expected


def documents_of(source, **options):
    """All texts, and what could not be read."""
    found = []
    for unit in open_source(source, **options).units():
        if not isinstance(unit, units.LongUnit):
            found += [text if isinstance(text, str) else f"! {text}" for text in unit.documents()]
            continue
        try:
            found.append("".join(unit.parts))
        except Unreadable as error:
            found.append(f"! {error}")
    return [text for text in found if text]


LINE = "größer 🙂 hello\r\n"
TEXTS = ["short", LINE * 40, "", "日本" * 300, "x " * 300, LINE, "\ufeffmark " * 50]


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def write_all(folder):
    """The texts in files of every kind and shape."""
    folder.mkdir()
    lines = "".join(
        json.dumps({"id": "y" * 400, "text": text, "n": 1}, ensure_ascii=i % 2) + "\r\n\n"
        for i, text in enumerate(TEXTS)
    )
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()[:-3]))
    (folder / "c.jsonl.zst").write_bytes(zstd(lines.encode()))
    for i, text in enumerate(TEXTS):
        (folder / f"d{i}.txt").write_text(text, encoding="utf-8", newline="")
    (folder / "e.md.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + "<|>".join(TEXTS).encode()))
    (folder / "f.md.zst").write_bytes(zstd("<|>".join(TEXTS).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "g.parquet", row_group_size=3)
    return folder


@pytest.mark.parametrize("separator", ["", "<|>", "\r\n"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:280"])
def test_long_documents_are_the_same_documents(tmp_path, small, tokenizer, separator):
    folder = write_all(tmp_path / "in")
    options = {"tokenizer": tokenizer, "separator": separator, "eval_fraction": 0.3}
    with pytest.MonkeyPatch.context() as patch:
        in_parts = documents_of(folder, separator=separator)
        assert any(isinstance(unit, units.LongUnit) for unit in open_source(folder, separator=separator).units())
        parts = prepare_corpus(folder, tmp_path / "parts", **options)
        for name, value in (("UNIT_BYTES", 2**20), ("LONG", 2**22)):
            patch.setattr(units, name, value)
        patch.setattr("deltaformer_jax.data.sources.content.BLOCK", 2**20)
        assert documents_of(folder, separator=separator) == in_parts
        whole = prepare_corpus(folder, tmp_path / "whole", **options)
    assert parts.hash == whole.hash and parts.manifest["splits"]["eval"]["documents"] > 1
    for name in ("train", "eval"):
        assert parts.split(name).lengths.tolist() == whole.split(name).lengths.tolist()
        for i in range(parts.split(name).documents):
            assert parts.split(name).read(i).tolist() == whole.split(name).read(i).tolist()


def test_long_documents_with_workers_and_after_a_stop(tmp_path, small, monkeypatch):
    folder = write_all(tmp_path / "in")
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    files = [
        {
            path.name: path.read_bytes()
            for path in prepare_corpus(folder, tmp_path / name, workers=workers).path.iterdir()
        }
        for name, workers in (("one", 1), ("two", 2))
    ]
    assert files[0] == files[1]
    really = build.tokenize_units
    for after in (4, 9):
        monkeypatch.setattr(
            build,
            "tokenize_units",
            lambda *a, after=after: itertools.chain(itertools.islice(really(*a), after), iter(interrupted, 0)),
        )
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(folder, tmp_path / "three")
    monkeypatch.setattr(build, "tokenize_units", really)
    three = prepare_corpus(folder, tmp_path / "three").path
    assert {path.name: path.read_bytes() for path in three.iterdir()} == files[0]


def interrupted():
    raise KeyboardInterrupt


# What cannot be read

LINES = {
    "digits": '{"text": "x", "id": ' + "9" * 5000 + "}",
    "deep": '{"text": "x", "id": ' + "[" * 200_000 + "]" * 200_000 + "}",
    "NaN": '{"text": NaN}',
    "null": '{"text": null}',
    "half a pair": '{"text": "a\\udc00"}',
    "half": '{"text": "a',
    "control": '{"text": "a\x01"}',
    "two": '{"text": "a"} {"text": "b"}',
    "no object": '["text"]',
    "no field": '{"body": "a"}',
}


@pytest.mark.parametrize("case", LINES)
def test_every_bad_line_has_its_place_or_is_left_out(tmp_path, capsys, case):
    good = json.dumps({"text": "good"})
    (tmp_path / "a.jsonl").write_text("\n".join([good, LINES[case], good]))
    arguments = [str(tmp_path / "a.jsonl"), "--eval_fraction", "0", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert "a.jsonl, line 2: " in printed and printed.count("\n") == 1
    assert printed.endswith("; --on_error skip leaves out what cannot be read\n")
    assert main([*arguments, "--on_error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert "2 documents" in printed and "left out 1 documents or files" in printed and "a.jsonl, line 2: " in printed
    assert "a.jsonl, line 2: " in (tmp_path / "out" / "left_out.txt").read_text()
    assert main(arguments) == 2  # it is not what "stop" would have made
    assert "holds a corpus that left out 1 documents" in capsys.readouterr().err


def parquet_file(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def bad_files(folder):
    """Files of every kind that hold nothing to read; the name says what an error says of each."""
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    whole = zstd(b"some text " * 100)
    packed = gzip.compress(os.urandom(3000))
    contents = {
        "a.txt": b"ab\xff",
        "b.txt.gz": b"no gzip",
        "c.txt.gz": packed[:1500],
        "d.txt.gz": packed[:1500] + b"xxxx" + packed[1504:],
        "e.txt.zst": b"no zstd",
        "f.txt.zst": whole[:-5],
        "g.jsonl.zst": whole[:-5],
        "h.jsonl.gz": packed[:1500],
        "i.parquet": b"PAR1 no parquet PAR1",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    names = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(names, folder / "j.parquet")
    parquet_file(folder / "k.parquet", body=["a"])
    parquet_file(folder / "l.parquet", text=[1, 2])
    parquet_file(folder / "m.parquet", text=pyarrow.array([["a"]]))
    parquet_file(folder / "n.parquet", text=pyarrow.array([b"a"], pyarrow.binary()))
    parquet_file(folder / "o.parquet", text=pyarrow.array(["good too", None]))
    invalid = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff"]).buffers())
    parquet_file(folder / "p.parquet", text=invalid)
    return [*contents, "j.parquet", "k.parquet", "l.parquet", "m.parquet", "n.parquet", "o.parquet", "p.parquet"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_files_that_cannot_be_read_are_named_or_left_out(tmp_path, capsys, tokenizer):
    names = bad_files(tmp_path / "in")
    flags = ["--eval_fraction", "0", "--tokenizer", tokenizer]
    for name in names:
        assert main([str(tmp_path / "in" / name), "--out", str(tmp_path / "no"), *flags]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(f"{PROGRAM}: error: {tmp_path}/in/{name}") and printed.count("\n") == 1, printed
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "out"), *flags, "--on_error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert f"left out {len(names)} documents or files" in printed and "2 documents" in printed
    left = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    assert [line.removeprefix(f"{tmp_path}/in/").split(":")[0].split(",")[0] for line in left] == names


GOOD = {
    "a.parquet": None,
    "a.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 50, mtime=0),
    "a.jsonl.zst": zstd(b'{"text": "a"}\n' * 50),
    "a.txt.gz": gzip.compress(b"some text " * 50, mtime=0),
    "a.jsonl": b'{"text": "a", "more": [1, 2.5e3, "\\ud83d\\ude00"]}\n' * 3,
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", GOOD)
def test_damaged_files_are_read_or_named(tmp_path, name, data):
    path = tmp_path / name
    if GOOD[name] is None:
        table = pyarrow.table({"text": [f"text {i}" for i in range(50)], "n": list(range(50))})
        pyarrow.parquet.write_table(table, path, row_group_size=20)
    else:
        path.write_bytes(GOOD[name])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    for text in documents_of(path):
        assert isinstance(text, str) and (not text.startswith("! ") or text.startswith(f"! {path}"))


def test_a_stop_at_an_error_keeps_what_was_done(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 1000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    records = [json.dumps({"text": f"{i} " * 100}) for i in range(50)]
    records[30:30] = ["bad"]
    (tmp_path / "a.jsonl").write_text("\n".join(records))
    arguments = [str(tmp_path / "a.jsonl"), "--eval_fraction", "0.2"]
    out, read, really = ["--out", str(tmp_path / "out")], [], build.tokenize_units

    def counted(*given):
        for unit in really(*given):
            read.append(unit)
            yield unit

    monkeypatch.setattr(build, "tokenize_units", counted)
    count = len(list(open_source(arguments[0]).units()))
    for _ in range(2):
        assert main([*arguments, *out]) == 2
        printed = capsys.readouterr().err
        assert "a.jsonl, line 31: not JSON" in printed and printed.endswith(", and the finished part is kept\n")
    first, read[:] = len(read), []
    assert "going on with an unfinished preparation" in printed and first < count
    assert main([*arguments, *out, "--on_error", "skip"]) == 0
    assert len(read) <= count - first + 2
    monkeypatch.setattr(build, "tokenize_units", really)
    assert main([*arguments, "--out", str(tmp_path / "at_once"), "--on_error", "skip"]) == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("out", "at_once")]
    assert files[0] == files[1] and "left_out.txt" in files[0]


def test_on_error_is_one_of_two(tmp_path):
    with pytest.raises(ValueError, match="on_error is 'ignore'; it must be 'stop' or 'skip'"):
        prepare_corpus("stdlib", tmp_path / "out", on_error="ignore")


# Memory

MEASURE = """
import json, resource, sys
from pathlib import Path
from deltaformer_jax.data import build, prepare_corpus
folder = Path(sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
line = "once upon a time there was a small cat who sat on a mat" * 20
shapes = {
    "one line.txt": (line + " ", ""), "CRLF.txt": (line + "\\r\\n", ""), "separators.txt": (line + "|", ""),
    "one record.jsonl": (line + "\\\\n", '{"id": 1, "text": "'),
    "lines.jsonl": (json.dumps({"text": line}) + "\\n", ""),
}
for size in (2, 48):
    for name, (piece, start) in shapes.items():
        with open(folder / name, "w", newline="") as file:
            file.write(start)
            for _ in range(size):
                file.write(piece * (2**20 // len(piece)))
            file.write('"}' if start else "")
        separator = "|" if name == "separators.txt" else ""
        prepare_corpus(folder / name, folder / f"{name} {size}", separator=separator, eval_fraction=0)
        (folder / name).unlink()
    print(peak())
"""


def test_memory_does_not_grow_with_the_source(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    small, large = map(int, done.stdout.split())
    assert large - small < 100, (
        small,
        large,
    )  # MiB; each of the five shapes is 48, and in Python's hands several times
