"""A corpus in an object store: what a host copies, and which ranges of the shards it reads for its rows."""

import multiprocessing
import os

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from support import object_store

from deltaformer_jax.data import batches, load_corpus, load_data, prepare_corpus, shards
from deltaformer_jax.data.batches import _Batches, _packing
from deltaformer_jax.data.remote import ranges
from deltaformer_jax.data.remote.ranges import PAGE, RemoteShard
from deltaformer_jax.data.remote.store import Store, fetch

SIZES = dict(sequence_length=64, batch_size=8, seed=1)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket is a folder; what is opened in it is noted. The cache is another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bucket").mkdir()
    with object_store.bucket(tmp_path / "bucket") as opened:
        yield opened


@pytest.fixture
def corpora(tmp_path, bucket, monkeypatch):
    """gs://bucket/text and gs://bucket/code, each of many shards, and the same as local corpora."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 2**14)
    draw, found = np.random.default_rng(0), []
    for name in ("text", "code"):
        (tmp_path / name).mkdir()
        for i in range(40):
            text = bytes(draw.integers(97, 123, draw.integers(1, 9000)).astype(np.uint8)).decode()
            (tmp_path / name / f"{i}.txt").write_text(text)
        found.append(prepare_corpus(tmp_path / name, tmp_path / "bucket" / name, eval_fraction=0.2))
    return found


def test_only_what_is_small_is_copied_and_only_once(corpora, bucket):
    corpus = load_corpus("gs://bucket/text")
    small = {"tokenizer.json", "train_lengths.npy", "eval_lengths.npy", "manifest.json"}
    assert {path.name for path in corpus.path.iterdir()} == small
    assert corpus.hash == corpora[0].hash and len(bucket) == 5  # the manifest twice
    assert load_corpus("gs://bucket/text").path == corpus.path
    assert bucket[5:] == ["gs://bucket/text/manifest.json"]


def read_and_documents(corpus, rows):
    """(batches 5 to 7 of these rows, the documents that were read for them)."""
    split, documents = corpus.split("train"), []

    def read(document, start, stop):
        documents.append(document)
        return type(split).read(split, document, start, stop)

    split.read = read
    source = _Batches(_packing(corpus, "train", 64, 1), 8, 5, 3, rows)
    return [source[i] for i in range(3)], documents


@pytest.mark.parametrize("processes", [2, 4])
def test_a_host_reads_the_records_of_its_rows_alone(corpora, bucket, processes):
    """It reads whole pages around its documents' records, each once, and the indices of their shards."""
    for rows in np.split(np.arange(8), processes):
        expected, documents = read_and_documents(corpora[0], rows)
        corpus = load_corpus("gs://bucket/text")
        del bucket[:]
        found, _ = read_and_documents(corpus, rows)
        for one, other in zip(found, expected, strict=True):
            for name, array in other.items():
                np.testing.assert_array_equal(one[name], array)
        split, needed, indices = corpus.split("train"), set(), {}
        for document in documents:
            shard = int(np.searchsorted(split._shard_ends, split._first_record[document], side="right"))
            path, records, remote_shard = split._shards[shard]
            begin = records - split._shard_ends[shard]
            first, last = remote_shard._places[split._first_record[document : document + 2] + begin]
            needed |= {(path, page) for page in range(first // PAGE, -(-last // PAGE))}
            indices[path] = remote_shard._places[-1]
        read = [(path, start // PAGE, -(-stop // PAGE)) for path, start, stop in bucket if start < indices[path]]
        pages = [(path, page) for path, start, stop in read for page in range(start, stop)]
        assert set(pages) == needed and len(pages) == len(needed)
        assert {path for path, _, _ in bucket} == indices.keys() and len(indices) < len(split._shards)


def test_batches_and_evaluation_are_those_of_the_local_corpora(corpora, bucket, monkeypatch):
    """In a mixture, by many threads; also if there is place for less than a shard, and for one reader."""
    mixture = "{0}/text=2,{0}/code=1"
    local = load_data(mixture.format(corpora[0].path.parent))
    expected = [next(stream) for stream in [batches(local, "train", **SIZES)] for _ in range(15)]
    evaluation = list(batches(local, "eval", **SIZES))
    for kept, readers in ((2**33, 256), (2**16, 1)):
        monkeypatch.setattr(ranges, "KEPT_BYTES", kept)
        monkeypatch.setattr(ranges, "READERS", readers)
        monkeypatch.setattr(ranges, "HELD", ranges._Held())
        distant = load_data(mixture.format("gs://bucket"))
        assert distant.hash == local.hash and distant.remote and not local.remote
        stream = batches(distant, "train", **SIZES)
        for one, other in zip(
            [next(stream) for _ in range(15)] + list(batches(distant, "eval", **SIZES)),
            expected + evaluation,
            strict=True,
        ):
            assert one.keys() == other.keys()
            for name, array in other.items():
                np.testing.assert_array_equal(one[name], array)
        assert len(ranges.HELD._readers) <= readers


def test_the_oldest_shards_make_room(corpora, bucket, monkeypatch):
    monkeypatch.setattr(ranges, "KEPT_BYTES", 2 * PAGE)
    monkeypatch.setattr(ranges, "HELD", ranges._Held())
    split = load_corpus("gs://bucket/text").split("train")
    for document in range(split.documents):
        split.read(document)
        folder = split._shards[0][2]._store.pages
        assert len([path for path in folder.iterdir() if path.name != "lock" and path.suffix != ".index"]) <= 2
    assert len(split._shards) > 2


def test_what_is_missing_cut_short_or_damaged_is_named(corpora, bucket, tmp_path):
    path = tmp_path / "bucket" / "text" / "train-00001.array_record"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"gs://bucket/text/train-00001\.array_record: \d+ bytes where the manifest"):
        load_corpus("gs://bucket/text")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/text/train-00001\.array_record: missing; copy"):
        load_corpus("gs://bucket/text")

    def read(changed):
        """Read it all, once it is `changed` while a run goes on."""
        path.write_bytes(content)
        split = load_corpus("gs://bucket/text").split("train")
        path.unlink() if changed is None else path.write_bytes(changed)
        for document in range(split.documents):
            split.read(document)

    read(content)
    name = r"gs://bucket/text/train-00001\.array_record: "
    with pytest.raises(FileNotFoundError, match=f"{name}not there"):
        read(None)
    with pytest.raises(ValueError, match=f"{name}damaged .*cut short: 5 of the bytes"):
        read(content[:5] if len(content) == 2**16 else content[: (len(content) - 1) // 2**16 * 2**16 + 5])
    with pytest.raises(ValueError, match=f"{name}damaged"):
        read(bytes([*content[:200], content[200] ^ 1, *content[201:]]))
    with pytest.raises(ValueError, match=f"{name}damaged .*no index of its records at the end"):
        read(content[:-PAGE] + bytes(PAGE) if len(content) < 2**17 else content[: -(2**16)] + bytes(2**16))
    (tmp_path / "bucket" / "text" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"gs://bucket/text/manifest.json: not the manifest of a corpus"):
        load_corpus("gs://bucket/text")
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/none: no corpus there \(no manifest.json\)"):
        load_corpus("gs://bucket/none")
    with pytest.raises(ValueError, match=r"nothing://bucket: .*not known"):
        load_corpus("nothing://bucket")


def test_a_copy_that_was_cut_short_goes_on(corpora, bucket, monkeypatch, tmp_path):
    really, copies = Store.copy, []

    def third_fails(self, name, target):
        copies.append(name)
        if len(copies) == 3:
            raise OSError("no space left on device")
        really(self, name, target)

    monkeypatch.setattr(Store, "copy", third_fails)
    with pytest.raises(OSError, match="no space left"):
        load_corpus("gs://bucket/text")
    corpus = load_corpus("gs://bucket/text")
    assert corpus.split("train").read(0).size and len(copies) == 3 + 2
    assert [path.name for path in corpus.path.parent.glob("corpus-*")] == [corpus.path.name]


def test_a_page_that_the_disk_lost_is_read_again(corpora, bucket):
    split = load_corpus("gs://bucket/text").split("train")
    before = [split.read(document) for document in range(split.documents)]
    held = split._shards[0][2]
    with open(held._copy.path, "r+b") as file:
        file.write(bytes(4096))
    for document, tokens in enumerate(before):
        np.testing.assert_array_equal(split.read(document), tokens)


def hold(folder):
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    store = Store(f"file://{folder}")
    assert store.pages.exists()
    os.kill(os.getpid(), 9)


def test_what_a_killed_process_held_is_removed_by_the_next(corpora, tmp_path):
    store, cache = Store(f"file://{tmp_path / 'bucket' / 'text'}"), tmp_path / "cache" / "deltaformer_jax"
    mine, context = store.pages, multiprocessing.get_context("spawn")
    process = context.Process(target=hold, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -9 and len(list(cache.glob(".corpus.partial-*"))) == 2
    fetch(store, "manifest.json", [])
    assert list(cache.glob(".corpus.partial-*")) == [mine]  # that of a living process stays


@pytest.mark.parametrize("lengths", [[0], [5, 0, 3], [20_000] * 9, list(range(3000)), [1] * 70_000], ids=len)
def test_every_record_is_where_the_index_says(lengths, tmp_path, monkeypatch):
    """Indices of one record and of several blocks, compressed or not; records of none and of several pages."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, draw = tmp_path / "a", np.random.default_rng(0)
    records = [draw.integers(0, 256, length).astype(np.uint8).tobytes() for length in lengths]
    writer = ArrayRecordWriter(str(path), "group_size:1,zstd:3" if len(lengths) != 9 else "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    shard = RemoteShard(Store(f"file://{tmp_path}"), "a", path.stat().st_size)
    for i in {0, len(lengths) // 2, len(lengths) - 1}:
        assert shard.read(i, i + 1) == records[i : i + 1]
    assert shard.read(0, len(lengths)) == records
