"""Folders as they are on the Hugging Face hub: one subset and split of them; texts that lie in nested fields."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from deltaformer_jax.data import load_corpus, prepare_corpus
from deltaformer_jax.data.prepare import main
from deltaformer_jax.data.sources import open_source


def write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    else:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts_of(folder, **part):
    return [text for unit in open_source(folder, **part).units() for text in unit.documents()]


@pytest.fixture
def one_subset(tmp_path):
    root = tmp_path / "one"
    write(root / "data" / "train-00000-of-00002.parquet", ["a", "b"])
    write(root / "data" / "train-00001-of-00002.parquet", ["c"])
    (root / "README.md").write_text("about the data")
    return root


@pytest.fixture
def several(tmp_path):
    root = tmp_path / "several"
    write(root / "en" / "train-00000-of-00001-a3ecf92756993583.parquet", ["en train"])
    write(root / "en" / "test-00000-of-00001-0123456789abcdef.parquet", ["en test"])
    write(root / "de" / "train-00000-of-00001.jsonl", ["de train"])
    write(root / "data" / "fr" / "train-00000-of-00001.parquet", ["fr train"])
    write(root / "it" / "train" / "0000.parquet", ["it train"])
    write(root / "train-00000-of-00001.parquet", ["default train"])
    return root


def test_the_only_subset_and_split_needs_no_name(one_subset, tmp_path):
    assert texts_of(one_subset) == texts_of(one_subset, subset="default", split="train") == ["a", "b", "c"]
    assert open_source(one_subset).left_out == [("README.md", "not of subset default, split train")]
    corpus = prepare_corpus(one_subset, tmp_path / "out", eval_fraction=0)
    assert (
        corpus.manifest["settings"]["source"] | {"subset": "default", "split": "train"}
        == (corpus.manifest["settings"]["source"])
    )
    assert "README.md: not of subset default" in (tmp_path / "out" / "left_out.txt").read_text()


def test_a_subset_and_a_split_are_chosen(several):
    assert texts_of(several, subset="en", split="train") == ["en train"]
    assert texts_of(several, subset="en", split="test") == ["en test"]
    for name in ("de", "fr", "it", "default"):
        assert texts_of(several, subset=name) == [f"{name} train"]


def test_what_is_not_named_is_listed_in_one_error(several, one_subset, tmp_path, capsys):
    odd, mixed = tmp_path / "odd", tmp_path / "mixed"
    for name in ("clean", "other"):
        write(odd / f"{name}-00000-of-00001.jsonl", ["x"])
    for name in ("c4-train.00000-of-00001.json.gz", "c4-validation.00000-of-00001.json.gz", "more.jsonl"):
        write(mixed / name, ["x"])
    cases = [
        (several, [], "several: has 5 subsets; choose one with --subset: de, default, en, fr, it"),
        (odd, [], "odd: has 2 splits; choose one with --split: clean, other"),
        (mixed, [], "mixed: holds the splits train, validation and files of other names, such as more.jsonl; choose"),
        (several, ["--subset", "es"], "several: has no subset 'es'; --subset is one of: de, default, en, fr, it"),
        (several, ["--subset", "de", "--split", "dev"], "several: has no split 'dev'; --split is one of: train"),
        (several / "de" / "train-00000-of-00001.jsonl", ["--split", "x"], "is a file; --subset and --split are for"),
    ]
    for source, flags, message in cases:
        assert main([str(source), "--out", str(tmp_path / "out"), *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    write(tmp_path / "other" / "texts.parquet", ["x"])
    with pytest.raises(ValueError, match="other: --subset and --split are for folders of shards"):
        open_source(tmp_path / "other", split="train")


C4 = ["en/c4-train.00000-of-00002.json.gz", "en/c4-train.00001-of-00002.json.gz"]
LAYOUTS = [
    (C4, ["en/c4-validation.00000-of-00001.json.gz"], "validation"),
    (["data/train-00000-of-00001.parquet"], ["data/validation-00000-of-00001.parquet"], "validation"),
    (["train/00.jsonl.gz", "train/01.jsonl.gz"], ["val.jsonl.gz", "test.jsonl.gz"], "val"),
    (["train.jsonl"], ["test.jsonl"], "test"),
    (["my_train.parquet"], ["my_dev.parquet"], "dev"),
    (
        ["multilingual/c4-af.tfrecord-00000-of-00002.json.gz", "multilingual/c4-af.tfrecord-00001-of-00002.json.gz"],
        ["multilingual/c4-af-validation.tfrecord-00000-of-00001.json.gz"],
        "validation",
    ),
    (["x/train/chunk1/a_0.jsonl"], ["x/validation/chunk1/a_train_0.jsonl"], "validation"),
]


@pytest.mark.parametrize(("train", "held_out", "split"), LAYOUTS)
def test_what_is_held_out_is_not_trained_on(tmp_path, capsys, train, held_out, split):
    root = tmp_path / "root"
    for name in [*train, *held_out]:
        write(root / name, [f"text of {name}"])
    write(root / "README.jsonl.md", ["about"])
    assert main([str(root), "--out", str(tmp_path / "out"), "--eval_fraction", "0"]) == 0
    said = capsys.readouterr().err
    assert said.count("root: read split train, left out ") == 1 and split in said and "--split takes another" in said
    corpus = load_corpus(tmp_path / "out")
    texts = [corpus.tokenizer.decode(corpus.split("train").read(i)) for i in range(len(train))]
    assert texts == [f"text of {name}" for name in train] and corpus.split("train").documents == len(train)
    chosen = open_source(root, held_out=True)
    assert [path.relative_to(root).as_posix() for path in chosen.files] == [n for n in held_out if split in n]
    assert [path.name for path in open_source(root, split=split).files] == [path.name for path in chosen.files]
    assert f"read split {split}, left out " in chosen.note and not open_source(root, split=split).note


def test_one_word_in_names_is_chance(tmp_path):
    for name in ("test.jsonl", "more/test_a.jsonl"):
        write(tmp_path / name, [name])
    assert texts_of(tmp_path) == ["more/test_a.jsonl", "test.jsonl"] and not open_source(tmp_path).description.get(
        "split"
    )
    assert texts_of(tmp_path, split="test", subset="more") == ["more/test_a.jsonl"]


def test_a_folder_with_files_of_other_names_is_read_whole_as_ever(one_subset):
    write(one_subset / "more.jsonl", ["d"])
    assert texts_of(one_subset) == ["a", "b", "c", "d"]
    assert open_source(one_subset).left_out == [("README.md", "describes the data")]
    assert texts_of(one_subset, split="train") == ["a", "b", "c"]


def test_subsets_without_splits_are_folders_at_any_depth(tmp_path, capsys):
    root, names = tmp_path / "web", ["data/CC-2024-10", "data/CC-2024-18", "sample/10BT", "sample/100BT"]
    for name in names:
        write(root / name / "000_00000.parquet", [name])
    (root / "data" / "LICENSE.txt").write_text("may be used")
    with pytest.warns(
        UserWarning, match=r"web: read the 4 folders CC-2024-10, .*, sample/10BT together; --subset takes"
    ):
        prepare_corpus(root, tmp_path / "whole", eval_fraction=0)
    (root / "README.md").write_text("about the data")
    assert main([str(root), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "web: has 4 subsets; choose one with --subset (. reads all), or name its folder: CC-2024-10, " in said
    for subset, read in [
        ("CC-2024-10", names[:1]),
        ("data/CC-2024-18", names[1:2]),
        ("sample/10BT", names[2:3]),
        ("sample", names[:1:-1]),
        (".", [*names[:2], *names[:1:-1]]),
    ]:
        assert texts_of(root, subset=subset) == read, subset
        assert open_source(root, subset=subset).description["subset"] == subset
    assert main([str(root), "--out", str(tmp_path / "out"), "--subset", "simple"]) == 2
    assert "web: has no subset 'simple'; --subset is one of: CC-2024-10, CC-2024-18, sample" in capsys.readouterr().err
    write(root / "sample" / "350BT" / "train-00000-of-00001.parquet", ["350"])
    assert texts_of(root, subset="sample/350BT") == ["350"] and texts_of(root, subset="CC-2024-10") == names[:1]


def test_json_lines_of_another_name_are_to_be_renamed(tmp_path):
    write(tmp_path / "train.json", ["a"])
    for source in (tmp_path, tmp_path / "train.json"):
        with pytest.raises(ValueError, match=r"with one object in each line is to be renamed to \.jsonl$"):
            open_source(source)


def test_a_description_without_data_below_it_is_a_text(tmp_path):
    for name in ("README.md", "docs/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert texts_of(tmp_path) == ["README.md", "docs/readme.txt"]
    write(tmp_path / "tests" / "a.jsonl", ["a"])
    assert texts_of(tmp_path) == ["docs/readme.txt", "a"]


RECORDS = [{"meta": {"text": f"text {i}", "id": i}, "text": "no", "deep": {"a": {"b": f"deep {i}"}}} for i in range(30)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("field", ["meta.text", "deep.a.b"])
def test_a_text_in_a_nested_field(tmp_path, kind, field):
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), file, row_group_size=7)
    else:
        file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    name = "text" if field == "meta.text" else "deep"
    expected = [f"{name} {i}" for i in range(30)]
    assert texts_of(file, text_field=field) == expected
    corpus = prepare_corpus(file, tmp_path / "out", text_field=field, eval_fraction=0, workers=1)
    split = corpus.split("train")
    assert [corpus.tokenizer.decode(split.read(i)) for i in range(30)] == expected


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_field_of_that_very_name_comes_first(tmp_path, kind):
    record = {"meta.text": "flat", "meta": {"text": "nested"}}
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert texts_of(tmp_path / f"a.{kind}", text_field="meta.text") == ["flat"]


def test_a_long_line_with_a_nested_text(tmp_path, monkeypatch):
    monkeypatch.setattr("deltaformer_jax.data.sources.units.LONG", 1000)
    monkeypatch.setattr("deltaformer_jax.data.sources.content.BLOCK", 100)
    long = "größer " * 20_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"meta": {"text": long, "other": "x" * 100}}))
    corpus = prepare_corpus(tmp_path / "a.jsonl", tmp_path / "out", text_field="meta.text", eval_fraction=0)
    assert corpus.tokenizer.decode(corpus.split("train").read(0)) == long


def test_a_nested_field_that_is_missing_is_named(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps({"meta": {"id": 1}}) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    cases = [
        ("a.jsonl", "meta.text", "a.jsonl, line 2: no field 'meta.text' (fields of 'meta': id); name it with"),
        ("a.jsonl", "meta", "a.jsonl, line 1: field 'meta' is dict, not text"),
        ("a.parquet", "meta.words", "a.parquet: no column 'meta.words' (columns: meta, text, deep)"),
        ("a.parquet", "meta.id", "a.parquet: column 'meta.id' is int64, not text"),
        ("a.parquet", "text.more", "a.parquet: no column 'text.more'"),
    ]
    for name, field, message in cases:
        assert main([str(tmp_path / name), "--out", str(tmp_path / "out"), "--text_field", field]) == 2
        assert message in capsys.readouterr().err


def test_a_struct_that_is_null_is_named(tmp_path):
    table = pyarrow.Table.from_pylist([{"meta": {"text": "a"}}, {"meta": None}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = texts_of(tmp_path / "a.parquet", text_field="meta.text")
    assert first == "a" and "row group 0, row 1: field 'meta.text' is NoneType, not text" in str(second)


def test_parquet_of_conversations_wants_messages(tmp_path, capsys):
    write(tmp_path / "a.parquet", ["a"])
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": [[{"role": "user", "content": "a"}]]}), tmp_path / "b.parquet"
    )
    for name, flags, message in [
        ("a.parquet", ["--chat", "plain"], "no column 'messages' (columns: text)"),
        ("a.parquet", ["--chat", "plain", "--text_field", "text"], "column 'text' is string, not a list of messages"),
        ("b.parquet", [], "no column 'text' (columns: messages); name it with --text_field, or --chat"),
        ("b.parquet", ["--chat", "plain"], "b.parquet, row group 0, row 0: has no message of role 'assistant'"),
    ]:
        assert main([str(tmp_path / name), "--out", str(tmp_path / "out"), *flags]) == 2
        assert message in capsys.readouterr().err
