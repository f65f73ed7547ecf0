"""prepare: every kind of source, the same folder whatever the workers, nothing half made, one clear error."""

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.program_run import ours

from deltaformer_jax.data import build, corpus, load_corpus, prepare_corpus, shards, train_bpe
from deltaformer_jax.data.prepare import PROGRAM, main
from deltaformer_jax.data.unfinished import open_unfinished, try_open

TEXTS = [f"Document {i}: größer, 日本, 🙂.\n" * (1 + i % 5) for i in range(50)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def text_folder(path, texts=TEXTS):
    for i, text in enumerate(texts):
        write(path / f"part{i % 3}" / f"{i:03}.txt", text)
    return path


def json_lines(texts=TEXTS, field="text"):
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def texts_of(prepared):
    splits = [prepared.split(name) for name in ("train", "eval")]
    return [prepared.tokenizer.decode(split.read(i)) for split in splits for i in range(split.documents)]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_text_files(tmp_path, tokenizer):
    prepared = prepare_corpus(text_folder(tmp_path / "in"), tmp_path / "out", tokenizer=tokenizer, eval_fraction=0.2)
    assert sorted(texts_of(prepared)) == sorted(TEXTS)
    splits = prepared.manifest["splits"]
    assert splits["train"]["documents"] + splits["eval"]["documents"] == 50 and 3 <= splits["eval"]["documents"] <= 20
    assert splits["train"]["bytes"] + splits["eval"]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    for name in ("train", "eval"):
        assert prepared.split(name).tokens == splits[name]["tokens"] == prepared.split(name).lengths.sum()
    assert prepared.manifest["tokenizer"]["hash"] == prepared.tokenizer.hash
    assert prepared.manifest["token_dtype"] == "<u2"
    if tokenizer == "bytes":
        assert splits["train"]["tokens"] == splits["train"]["bytes"]


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.jsonl", lambda content: content),
        ("a.jsonl.gz", gzip.compress),
        ("a.jsonl.zst", zstd),
        ("a.json.gz", lambda content: gzip.compress(content[:200]) + gzip.compress(content[200:])),  # two members
        ("a.jsonl.zst", lambda content: zstd(content[:200]) + zstd(content[200:])),  # two frames
        ("a.jsonl", lambda content: b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n\n")[:-3]),  # BOM, blank lines
    ],
)
def test_json_lines(tmp_path, name, pack, monkeypatch):
    monkeypatch.setattr("deltaformer_jax.data.sources.units.UNIT_BYTES", 1000)  # many units
    prepared = prepare_corpus(write(tmp_path / name, pack(json_lines())), tmp_path / "out", eval_fraction=0)
    assert texts_of(prepared) == TEXTS


def test_parquet(tmp_path):
    table = pyarrow.table({"content": TEXTS, "id": list(range(50))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    prepared = prepare_corpus(tmp_path / "a.parquet", tmp_path / "out", text_field="content", eval_fraction=0)
    assert texts_of(prepared) == TEXTS


@pytest.mark.parametrize(("name", "pack"), [("a.txt.gz", gzip.compress), ("a.py.zst", zstd), ("a.md", bytes)])
def test_compressed_text_and_documents_cut_at_a_separator(tmp_path, name, pack, capsys):
    source = write(tmp_path / name, pack("<|endoftext|>\n".join(TEXTS).encode()))
    whole = prepare_corpus(source, tmp_path / "whole", eval_fraction=0)
    assert texts_of(whole) == ["<|endoftext|>\n".join(TEXTS)]
    arguments = [str(source), "--out", str(tmp_path / "cut"), "--eval_fraction", "0"]
    assert main([*arguments, "--separator", "<|endoftext|>\\n"]) == 0
    assert texts_of(load_corpus(tmp_path / "cut")) == TEXTS
    assert main(arguments) == 2 and "made with another separator" in capsys.readouterr().err


def test_a_folder_of_several_kinds_in_sorted_order_without_hidden_or_unknown_files(tmp_path):
    source = tmp_path / "in"
    write(source / "b.jsonl", json_lines(TEXTS[1:3]))
    write(source / "a.md", TEXTS[0])
    write(source / "c" / "d.py", TEXTS[3])
    write(source / "empty.txt", "")
    for name in (".git/config.txt", ".hidden.txt", "picture.png", "__pycache__/a.py"):
        write(source / name, "no text of ours")
    prepared = prepare_corpus(source, tmp_path / "out", eval_fraction=0)
    assert texts_of(prepared) == TEXTS[:4]
    assert prepared.manifest["source_files_left_out"] == 1


def test_workers_only_share_the_work(tmp_path, monkeypatch):
    source = text_folder(tmp_path / "in")
    write(source / "z.jsonl", json_lines([text * 3 for text in TEXTS]))
    monkeypatch.setattr("deltaformer_jax.data.sources.units.UNIT_BYTES", 700)
    settings = {"tokenizer": "bpe:300", "eval_fraction": 0.3}
    prepare_corpus(source, tmp_path / "one", workers=1, **settings)
    prepare_corpus(source, tmp_path / "two", workers=2, **settings)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_the_split_is_by_content(tmp_path):
    """A text is on the same side under any name, in any order, beside any others; equal texts are together."""
    one = prepare_corpus(text_folder(tmp_path / "a"), tmp_path / "one", eval_fraction=0.4)
    lines = write(tmp_path / "b.jsonl", json_lines([*reversed(TEXTS), *TEXTS, "another"]))
    other = prepare_corpus(lines, tmp_path / "other", eval_fraction=0.4)

    def evaluated(prepared):
        split = prepared.split("eval")
        return {prepared.tokenizer.decode(split.read(i)) for i in range(split.documents)}

    assert evaluated(one) == evaluated(other) - {"another"} and evaluated(one)
    assert other.split("eval").documents >= 2 * len(evaluated(one))


def test_hash_follows_content_not_place(tmp_path):
    one = prepare_corpus(text_folder(tmp_path / "a"), tmp_path / "one")
    same = prepare_corpus(text_folder(tmp_path / "b"), tmp_path / "same")
    changed = prepare_corpus(text_folder(tmp_path / "c", [*TEXTS[:-1], "changed"]), tmp_path / "changed")
    assert one.hash == same.hash != changed.hash


def test_shards_and_long_documents(tmp_path, monkeypatch):
    """A document of many records, shards closed at a document's end, any slice read back."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    texts = ["ab" * 50_000, "c", "de" * 8192, "f" * 8192, "g" * 8193, *TEXTS]
    prepared = prepare_corpus(write(tmp_path / "a.jsonl", json_lines(texts)), tmp_path / "out", eval_fraction=0)
    written = prepared.manifest["splits"]["train"]["shards"]
    assert len(written) == 2 and written[0]["records"] == 13
    assert texts_of(prepared) == texts
    split = prepared.split("train")
    whole = np.frombuffer(texts[0].encode(), np.uint8)
    for start, stop in [(0, 0), (8191, 8193), (8192, 16384), (99_999, 100_000), (5, 60_000), (100_000, 100_000)]:
        np.testing.assert_array_equal(split.read(0, start, stop), whole[start:stop])
    with pytest.raises(ValueError, match="tokens 5:100001 of document 0, which has 100000"):
        split.read(0, 5, 100_001)


def test_large_vocabularies_are_stored_in_32_bits():
    class Large:
        vocab_size = 2**16 + 1

    assert build.token_dtype(Large()) == np.dtype("<u4")
    Large.vocab_size = 2**16
    assert build.token_dtype(Large()) == np.dtype("<u2")


def test_bpe_learns_from_training_documents_alone(tmp_path):
    """Eval documents may say anything else: the tokenizer is the same."""
    prepared = prepare_corpus(write(tmp_path / "a.jsonl", json_lines()), tmp_path / "out", eval_fraction=0.4)
    split = prepared.split("train")
    training = [prepared.tokenizer.decode(split.read(i)) for i in range(split.documents)]
    assert len(training) < 50
    with_eval = prepare_corpus(tmp_path / "a.jsonl", tmp_path / "with_eval", tokenizer="bpe:300", eval_fraction=0.4)
    write(tmp_path / "b.jsonl", json_lines(training))
    without = prepare_corpus(tmp_path / "b.jsonl", tmp_path / "without", tokenizer="bpe:300", eval_fraction=0)
    assert with_eval.tokenizer.hash == without.tokenizer.hash


def test_the_same_settings_find_it_there_and_others_are_refused(tmp_path, capsys):
    source, out = text_folder(tmp_path / "in"), tmp_path / "out"
    arguments = [str(source), "--out", str(out), "--workers", "1"]
    assert main(arguments) == 0 and "prepared, vocabulary 257" in capsys.readouterr().out
    before = files_of(out)
    assert main(arguments) == 0 and "is there already" in capsys.readouterr().out
    assert main([*arguments, "--eval_fraction", "0.5"]) == 2
    assert "made with another eval_fraction; choose another folder, or --force" in capsys.readouterr().err
    write(source / "more.txt", "more")
    assert main(arguments) == 2 and "made with another source" in capsys.readouterr().err
    assert files_of(out) == before
    assert main([*arguments, "--force"]) == 0 and files_of(out) != before
    assert "more" in texts_of(load_corpus(out))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_force_leaves_other_folders_alone(tmp_path, capsys):
    write(tmp_path / "out" / "thesis.tex", "years of work")
    assert main([str(text_folder(tmp_path / "in")), "--out", str(tmp_path / "out"), "--force"]) == 2
    assert "exists and is not a corpus" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == {"thesis.tex": b"years of work"}


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "in" / "a.txt", "good")
    write(tmp_path / "in" / "b.txt", b"\xff\xfe bad")
    with pytest.raises(ValueError, match=r"b\.txt: not UTF-8 \(byte 0\)"):
        prepare_corpus(tmp_path / "in", tmp_path / "out")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "tokenize_units", interrupted)
    assert main([str(tmp_path / "in" / "a.txt"), "--out", str(tmp_path / "out")]) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_killed_run_leaves_nothing_that_loads(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "deep" / "out"
    os.mkfifo(source)  # a source that never ends
    command = [sys.executable, "-m", "deltaformer_jax.data.prepare", str(source), "--out", str(out), "--workers", "1"]
    for kill, left in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        with open(source, "wb") as pipe:  # waits until the program reads
            pipe.write(json_lines())
            pipe.flush()
            deadline = time.monotonic() + 120
            while not list(out.parent.glob(".out.partial-*")) and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(kill)
            process.communicate(timeout=120)
        assert len(list(out.parent.iterdir())) == left
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load_corpus(out)


def small_units(monkeypatch):
    monkeypatch.setattr("deltaformer_jax.data.sources.units.UNIT_BYTES", 1000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError, ValueError])
def test_what_was_cut_short_goes_on_and_ends_the_same(tmp_path, monkeypatch, stop):
    small_units(monkeypatch)
    text_folder(tmp_path / "in", TEXTS[:20])
    source = write(tmp_path / "in" / "z.jsonl", json_lines([text * 3 for text in TEXTS])).parent
    settings = {"tokenizer": "bpe:300", "eval_fraction": 0.3}
    whole = prepare_corpus(source, tmp_path / "whole", **settings).path
    assert len(list(whole.glob("train-*"))) > 3 and len(list(whole.glob("eval-*"))) > 3
    really, left, read, learnt = build.tokenize_units, [], [], []
    monkeypatch.setattr(build, "train_bpe", lambda *arguments: learnt.append(1) or train_bpe(*arguments))

    def cut_short(after):
        def units(*arguments):
            for i, unit in enumerate(really(*arguments)):
                if i == after:
                    raise stop("no more")
                read.append(unit)
                yield unit

        return units

    for after in (1, 9, 4, 8, None):  # units made before each stop
        monkeypatch.setattr(build, "tokenize_units", cut_short(after))
        if after is None:
            prepare_corpus(source, tmp_path / "out", **settings)
        else:
            with pytest.raises(stop):
                prepare_corpus(source, tmp_path / "out", **settings)
        left.append(build.can_go_on(tmp_path / "out"))
    assert files_of(tmp_path / "out") == files_of(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]
    assert left == [False, True, True, True, False]
    assert len(learnt) == 2
    count = len(list(build.open_source(source).units()))
    assert len(read) < count + 1 + 4 * 3


def test_a_killed_preparation_goes_on(tmp_path, monkeypatch, capsys):
    """SIGKILL in the middle of a unit, three times, then to the end: the folder of a run that was never killed."""
    small_units(monkeypatch)
    source = write(tmp_path / "in" / "a.jsonl", json_lines([text * 3 for text in TEXTS]))
    whole = prepare_corpus(source, tmp_path / "whole", eval_fraction=0.3).path
    program = (
        "import os, signal, sys; from deltaformer_jax.data import build, shards\n"
        "from deltaformer_jax.data.sources import units\n"
        "units.UNIT_BYTES, shards.SHARD_BYTES, really, made = 1000, 1000, build.SplitWriter.add, []\n"
        "def add(*arguments):\n"
        "    made.append(1)\n"
        "    if len(made) == 22: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    really(*arguments)\n"
        "build.SplitWriter.add = add\n"
        "from deltaformer_jax.data.prepare import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, str(source), "--out", str(tmp_path / "out"), "--eval_fraction", "0.3"]
    runs = [subprocess.run(command, capture_output=True, text=True, timeout=60) for _ in range(4)]
    codes = [run.returncode for run in runs]
    assert codes[0] == codes[1] == -signal.SIGKILL and codes[-1] == 0, codes
    assert "going on with an unfinished preparation" in runs[1].stderr and ours(runs[0].stderr) == ""
    assert files_of(tmp_path / "out") == files_of(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    small_units(monkeypatch)
    source = write(tmp_path / "in" / "a.jsonl", json_lines([text * 3 for text in TEXTS]))
    really = build.tokenize_units

    def units(*arguments):
        for i, unit in enumerate(really(*arguments)):
            if i == 10:
                raise KeyboardInterrupt
            yield unit

    monkeypatch.setattr(build, "tokenize_units", units)
    arguments = [str(source), "--out", str(tmp_path / "out")]
    assert main(arguments) == 130
    assert capsys.readouterr().err == f"{PROGRAM}: error: interrupted; {tmp_path / 'out'} is unchanged; " + (
        "the same command continues from here\n"
    )
    monkeypatch.setattr(build, "tokenize_units", really)
    assert main([*arguments, "--eval_fraction", "0.5"]) == 0  # another corpus: what was left is no use to it
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_on_a_disk_without_locks(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refused)
    (tmp_path / ".out.partial-0").mkdir()  # of another process, for all that can be known
    assert sorted(texts_of(prepare_corpus(text_folder(tmp_path / "in"), tmp_path / "out"))) == sorted(TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-0", "in", "out"]


def test_a_second_process_leaves_the_first_ones_work_alone(tmp_path):
    source, out = text_folder(tmp_path / "in"), tmp_path / "out"
    first = open_unfinished(out, ["something else"])
    prepare_corpus(source, out)
    assert first.path.exists()
    with first.lock:
        assert try_open(first.path) is None
    second = try_open(first.path)
    with second.lock:
        assert second.locked


def test_a_damaged_unfinished_folder_is_not_gone_on_with(tmp_path, monkeypatch):
    small_units(monkeypatch)
    source = write(tmp_path / "in" / "a.jsonl", json_lines([text * 3 for text in TEXTS]))
    really = build.tokenize_units

    def units(*arguments):
        for i, unit in enumerate(really(*arguments)):
            if i == 10:
                raise KeyboardInterrupt
            yield unit

    monkeypatch.setattr(build, "tokenize_units", units)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(source, tmp_path / "out")
    monkeypatch.setattr(build, "tokenize_units", really)
    (shard,) = tmp_path.glob(".out.partial-*/train-00000.array_record")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"train-00000.array_record: was changed meanwhile; the same call again starts"
    ):
        prepare_corpus(source, tmp_path / "out")
    assert sorted(texts_of(prepare_corpus(source, tmp_path / "out"))) == sorted(text * 3 for text in TEXTS)


def test_a_full_disk(tmp_path):
    """A limit on file size stands for it: the error is one line, and what was written is gone."""
    write(tmp_path / "a.txt", np.random.default_rng(0).bytes(2**21).hex())
    program = (
        "import resource, sys; from deltaformer_jax.data.prepare import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--workers", "1", "--eval_fraction", "0"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    printed = ours(done.stderr)
    assert done.returncode == 2 and printed.startswith(f"{PROGRAM}: error: cannot write the corpus: "), printed
    assert printed.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_interrupted_from_the_keyboard_with_workers(tmp_path):
    """Ctrl-C reaches the whole process group: one line, no tracebacks from the workers, nothing left."""
    source, out = write(tmp_path / "in" / "a.jsonl", json_lines([text * 20_000 for text in TEXTS])), tmp_path / "out"
    train_bpe(TEXTS, 300).save(tmp_path / "in" / "bpe")
    command = [sys.executable, "-m", "deltaformer_jax.data.prepare", str(source), "--out", str(out), "--workers", "2"]
    command += ["--tokenizer", str(tmp_path / "in" / "bpe")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 130 and ours(printed) == f"{PROGRAM}: error: interrupted; {out} is unchanged\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


CASES = {
    "no source": (lambda p: "", [], "SOURCE is empty"),
    "bucket source": (lambda p: "gs://bucket/a.txt", [], "gs://bucket/a.txt: not on a local or mounted disk"),
    "no out": (lambda p: write(p / "a.txt", "x"), ["--out", ""], "--out is empty"),
    "no place": (lambda p: write(p / "a.txt", "x"), ["--out", "/proc/none/x"], "/proc/none/x: cannot be made"),
    "not gzipped text": (lambda p: write(p / "a.py.gz", "x"), [], "a.py.gz: cannot be decompressed"),
    "no such source": (lambda p: p / "none", [], "none: no such file or folder"),
    "unknown suffix": (lambda p: write(p / "a.docx", "x"), [], r"a.docx: unknown suffix '.docx'; known: text or code"),
    "nothing known in it": (lambda p: write(p / "in/a.png", "x").parent, [], "holds no file of a known kind"),
    "only empty files": (lambda p: write(p / "a.txt", ""), [], "a.txt: no document with text"),
    "all in eval": (
        lambda p: write(p / "a.txt", "x"),
        ["--eval_fraction", "0.9999999"],
        "all 1 documents are in split eval; lower --eval_fraction",
    ),
    "not UTF-8": (lambda p: write(p / "a.txt", b"abc\xff"), [], "a.txt: not UTF-8 (byte 3); convert it"),
    "line not UTF-8": (lambda p: write(p / "a.jsonl", b'{"text": "\xff"}'), [], "a.jsonl, line 1: not UTF-8"),
    "not JSON": (lambda p: write(p / "a.jsonl", '{"text": "a"}\n{"te'), [], "a.jsonl, line 2: not JSON"),
    "missing field": (
        lambda p: write(p / "a.jsonl", '{"text": "a"}\n\n{"body": "b", "id": 1}'),
        [],
        "a.jsonl, line 3: no field 'text' (fields: body, id); name it with --text_field",
    ),
    "no object": (lambda p: write(p / "a.jsonl", "[1]"), [], "a.jsonl, line 1: no field 'text'"),
    "not a text": (lambda p: write(p / "a.jsonl", '{"text": 5}'), [], "line 1: field 'text' is int, not text"),
    "half a character": (lambda p: write(p / "a.jsonl", '{"text": "\\ud800"}'), [], "half a surrogate pair"),
    "not gzip": (lambda p: write(p / "a.jsonl.gz", "x"), [], "a.jsonl.gz: cannot be decompressed"),
    "half a gzip": (lambda p: write(p / "a.jsonl.gz", gzip.compress(json_lines())[:90]), [], "cannot be decompressed"),
    "not zstd": (lambda p: write(p / "a.jsonl.zst", "x" * 50), [], "a.jsonl.zst: cannot be decompressed"),
    "half a zstd": (lambda p: write(p / "a.jsonl.zst", zstd(json_lines())[:-20]), [], "cannot be decompressed"),
    "not parquet": (lambda p: write(p / "a.parquet", "x" * 50), [], "a.parquet: not a readable Parquet file"),
    "no column": (
        lambda p: pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), p / "a.parquet") or p / "a.parquet",
        [],
        "a.parquet: no column 'text' (columns: body)",
    ),
    "no tokenizer file": (lambda p: write(p / "a.txt", "x"), ["--tokenizer", "none.json"], "none.json: no such"),
    "bpe too small": (lambda p: write(p / "a.txt", "x"), ["--tokenizer", "bpe:100"], "bpe size 100 is too small"),
    "bpe no number": (lambda p: write(p / "a.txt", "x"), ["--tokenizer", "bpe:big"], "must be a whole number"),
    "no workers": (lambda p: write(p / "a.txt", "x"), ["--workers", "0"], "workers is 0"),
    "eval_fraction": (lambda p: write(p / "a.txt", "x"), ["--eval_fraction", "1"], "eval_fraction is 1.0"),
    "bucket": (lambda p: write(p / "a.txt", "x"), ["--out", "gs://b/c"], "gs://b/c: a corpus is made on a local"),
    "out in source": (lambda p: write(p / "a.txt", "x").parent, [], "lies in the source"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(tmp_path, capsys, case):
    make, flags, message = CASES[case]
    source = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(source), "--out", str(tmp_path / "out"), "--workers", "1", *flags]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"{PROGRAM}: error: ") and message in printed.err and printed.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_in_a_worker_process_is_the_same_error(tmp_path):
    write(tmp_path / "a.jsonl", json_lines(TEXTS) + b'{"body": "b"}\n')
    command = [sys.executable, "-m", "deltaformer_jax.data.prepare", str(tmp_path / "a.jsonl"), "--workers", "2"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    # What takes long is said, in lines that end in "...".
    printed = "".join(line for line in ours(done.stderr).splitlines(True) if not line.endswith(" ...\n"))
    assert printed.startswith(f"{PROGRAM}: error: ") and printed.count("\n") == 1 and "line 51: no field" in printed


def test_lines_are_counted_over_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr("deltaformer_jax.data.sources.units.UNIT_BYTES", 500)
    write(tmp_path / "a.jsonl", json_lines(TEXTS) + b"[]\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 51: no field 'text'"):
        prepare_corpus(tmp_path / "a.jsonl", tmp_path / "out")


def test_progress_is_drawn_on_a_terminal(tmp_path, capsys):
    prepare_corpus(text_folder(tmp_path / "in"), tmp_path / "out", tokenizer="bpe:300", progress=True)
    printed = capsys.readouterr()
    assert "50 documents" in printed.err and "learning 300 tokens" in printed.err and printed.out == ""


def test_another_process_may_be_first(tmp_path, monkeypatch):
    """The folder appears while this run writes: the same settings take it, others are refused."""
    source, out = text_folder(tmp_path / "in"), tmp_path / "out"
    write_really = build._write

    def overtaken(by):
        def write_after(*arguments):
            monkeypatch.setattr(build, "_write", write_really)
            prepare_corpus(source, out, eval_fraction=by)
            write_really(*arguments)

        monkeypatch.setattr(build, "_write", write_after)

    overtaken(by=0.1)
    assert prepare_corpus(source, out, eval_fraction=0.1).manifest["settings"]["eval_fraction"] == 0.1
    for path in out.iterdir():
        path.unlink()
    overtaken(by=0.1)
    with pytest.raises(FileExistsError, match="made with another eval_fraction"):
        prepare_corpus(source, out, eval_fraction=0.2)
    assert corpus.load_corpus(out).manifest["settings"]["eval_fraction"] == 0.1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
