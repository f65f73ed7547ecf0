"""A prepared corpus on disk: its manifest, its tokenizer, its document lengths, and random access to its tokens.

DIR/manifest.json         counts, settings, hashes (also its own: an edited manifest is refused)
DIR/tokenizer.json        the tokenizer
DIR/SPLIT_lengths.npy     int64 [documents]: tokens of each document, in order; SPLIT is train or eval
DIR/SPLIT-00000.array_record ...   the tokens: a record is a document, or the next PIECE tokens of a longer one,
                          as little-endian uint16 (uint32 above 65,536 ids). In a corpus of conversations, whose
                          manifest has "loss_mask": true, bits follow: which of these tokens bear loss
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from deltaformer_jax.data.remote.ranges import READERS, RemoteShard, open_local
from deltaformer_jax.data.remote.store import Store, fetch
from deltaformer_jax.data.tokenizer import Tokenizer, load_tokenizer
from deltaformer_jax.host.paths import expand

FORMAT = "deltaformer_jax corpus"
FORMAT_VERSION = 1
PIECE = 8192  # maximum tokens in a record, which bounds the cost of reading one row of a very long document
SPLITS = ("train", "eval")
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"


class Split:
    """The documents of one split. `lengths`: int64 [documents], their tokens without end-of-text, all above 0.

    shards: (path or address, records, RemoteShard or None) of each shard; None: it is opened at its path.
    masked: whether the documents are conversations, of which only some tokens bear loss.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        shards: list[tuple[Path | str, int, RemoteShard | None]],
        dtype: np.dtype,
        eot: int,
        masked: bool = False,
    ):
        self.masked = masked
        self.lengths = lengths
        self.documents = len(lengths)
        self.tokens = int(lengths.sum())
        self.eot = eot
        self._dtype = dtype
        self._shards = shards
        # Records are numbered over all shards. Document i has the records _first_record[i] .. _first_record[i + 1] - 1,
        # which are all in one shard.
        self._first_record = np.concatenate([[0], np.cumsum(-(-lengths // PIECE))])
        self._shard_ends = np.cumsum([records for _, records, _ in shards], dtype=np.int64)
        # Threads may share readers. The limit is a number of files that any process can have open.
        self._reader = functools.lru_cache(maxsize=READERS)(self._open)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start .. stop - 1 of a document (default: all), an array [stop - start] of the stored dtype.

        Reads only the records that hold them. Thread-safe. Raises ValueError if the shard is damaged.
        """
        return self.read_with_mask(document, start, stop)[0]

    def read_with_mask(self, document: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `read`, and which of these tokens bear loss: bool [stop - start], all True unless the split is masked."""
        length = int(self.lengths[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"tokens {start}:{stop} of document {document}, which has {length}")
        if start == stop:
            return np.zeros(0, self._dtype), np.zeros(0, bool)
        first, last = start // PIECE, -(-stop // PIECE)
        shard = int(np.searchsorted(self._shard_ends, self._first_record[document], side="right"))
        path, records, _ = self._shards[shard]
        begin = int(self._first_record[document] - self._shard_ends[shard]) + records
        try:
            # A range takes the same time in any shard; a list of records takes time for each record of the shard.
            pieces = self._reader(shard).read(begin + first, begin + last)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"{path}: damaged ({error}); prepare the corpus again") from None
        count, masks = min(last * PIECE, length) - first * PIECE, []
        if self.masked:
            counts = [PIECE] * (len(pieces) - 1) + [count - PIECE * (len(pieces) - 1)]
            sizes = [n * self._dtype.itemsize for n in counts]
            if [len(piece) for piece in pieces] != [size + -(-n // 8) for size, n in zip(sizes, counts)]:
                raise ValueError(f"{path}: records and document lengths disagree; prepare the corpus again")
            bits = [np.frombuffer(piece[size:], np.uint8) for piece, size in zip(pieces, sizes)]
            masks = [np.unpackbits(some, count=n).astype(bool) for some, n in zip(bits, counts)]
            pieces = [piece[:size] for piece, size in zip(pieces, sizes)]
        content = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if len(content) != count * self._dtype.itemsize:
            raise ValueError(f"{path}: records and document lengths disagree; prepare the corpus again")
        mask = np.concatenate(masks) if self.masked else np.ones(count, bool)
        here = slice(start - first * PIECE, stop - first * PIECE)
        return np.frombuffer(content, self._dtype)[here], mask[here]

    def _open(self, shard: int) -> Any:
        path, _, remote = self._shards[shard]
        return open_local(path) if remote is None else remote


def record_of(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The record of a piece of a conversation, uint8: its tokens, then its mask, a bit for each token."""
    return np.frombuffer(tokens.tobytes() + np.packbits(mask).tobytes(), np.uint8)


class Part:
    """A part of `split`, with the interface of a Split: tokens starts[i] .. starts[i] + lengths[i] - 1 of document i.

    starts and lengths are int64 [documents]. Documents with length 0 are left out.
    """

    def __init__(self, split: Split, starts: np.ndarray, lengths: np.ndarray):
        (self._documents,) = np.nonzero(lengths)
        self._split, self._starts = split, starts[self._documents]
        self.lengths = lengths[self._documents]
        self.documents = len(self.lengths)
        self.tokens = int(self.lengths.sum())
        self.eot = split.eot
        self.masked = False

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        length, first = int(self.lengths[document]), int(self._starts[document])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ValueError(f"tokens {start}:{stop} of document {document}, which has {length}")
        return self._split.read(int(self._documents[document]), first + start, first + stop)


class Corpus:
    """A prepared corpus whose files have been checked.

    Attributes:
      path: its folder.
      manifest: the content of manifest.json.
      tokenizer: the Tokenizer that it was prepared with.
      hash: sha256 of what decides every token: tokenizer, documents, their order and split. Independent of path.
      remote: whether its shards are in an object store.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        tokenizer: Tokenizer,
        splits: dict[str, Split],
        remote: bool = False,
    ):
        self.path = path
        self.remote = remote
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.hash: str = manifest["content_hash"]
        self._splits = splits

    def split(self, name: str) -> Split:
        if name not in self._splits:
            raise ValueError(f"split {name!r} is not one of {', '.join(map(repr, SPLITS))}")
        return self._splits[name]


def load_corpus(path: str | os.PathLike) -> Corpus:
    """The corpus in folder `path`. Cost: reads the document lengths and the size of each shard, but no tokens.

    Of a corpus at an address such as gs://bucket/corpus the lengths and the tokenizer are copied to this host, once
    (`remote.store.fetch`), and the shards are read by ranges (`remote.ranges`).

    Raises FileNotFoundError for a missing folder or file. Raises ValueError for a file that is not part of a corpus,
    was edited or cut short, or is another tokenizer than the manifest says. Both errors name the file.
    """
    store = Store(os.fspath(path)) if "://" in os.fspath(path) else None
    small = [TOKENIZER_FILE, *map(lengths_file, SPLITS)]
    folder = local_folder(path) if store is None else fetch(store, MANIFEST_FILE, small)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; make it with python -m deltaformer_jax.data.prepare")
    manifest = _read_manifest(folder)
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    if tokenizer.hash != manifest["tokenizer"]["hash"]:
        raise ValueError(f"{folder / TOKENIZER_FILE}: not the tokenizer that the corpus was made with")
    splits = {name: _load_split(folder, name, manifest, tokenizer, store) for name in SPLITS}
    return Corpus(folder, manifest, tokenizer, splits, store is not None)


def with_held_out_tail(corpus: Corpus, share: float) -> Corpus:
    """The same corpus, with the last `share` of each training document, rounded up to tokens, as its evaluation split.

    Its hash stays the same, since the share is a setting of the training run. Raises ValueError if the corpus already
    has evaluation documents, or if it is of conversations.
    """
    if corpus.split("train").masked:
        raise ValueError(f"{corpus.path} has conversations, which are not cut; prepare it with --eval_fraction instead")
    if corpus.split("eval").documents:
        raise ValueError(f"{corpus.path} has evaluation documents of its own; leave it at 0")
    train = corpus.split("train")
    tails = np.ceil(train.lengths * share).astype(np.int64)
    heads = train.lengths - tails
    if not heads.any():
        raise ValueError(f"{corpus.path} has documents of {train.lengths.max()} tokens at most: too short to be cut")
    splits = {"train": Part(train, np.zeros_like(heads), heads), "eval": Part(train, heads, tails)}
    counts = {
        name: {**corpus.manifest["splits"][name], "tokens": part.tokens, "documents": part.documents}
        for name, part in splits.items()
    }
    return Corpus(corpus.path, {**corpus.manifest, "splits": counts}, corpus.tokenizer, splits, corpus.remote)


def holds_conversations(path: str | os.PathLike) -> bool:
    """Whether the corpus in folder `path` is of conversations. Reads its manifest only; False if it has none."""
    try:
        remote = "://" in os.fspath(path)
        read = Store(os.fspath(path)).read if remote else lambda name: (Path(expand(path)) / name).read_bytes()
        manifest = json.loads(read(MANIFEST_FILE))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return isinstance(manifest, dict) and bool(manifest.get("loss_mask"))


def local_folder(path: str | os.PathLike) -> Path:
    """`path` as a Path. Raises ValueError for an address such as gs://..., where ArrayRecord cannot write."""
    if "://" in os.fspath(path):
        raise ValueError(f"{path}: a corpus is made on a local or mounted disk; copy the finished folder there")
    return Path(expand(path))


def manifest_hash(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest without its entry "manifest_hash"."""
    rest = {key: value for key, value in manifest.items() if key != "manifest_hash"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def lengths_file(split: str) -> str:
    return f"{split}_lengths.npy"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: missing, so {folder} is not a prepared corpus") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); prepare the corpus again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: not the manifest of a corpus")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {manifest.get('format_version')}, but this package reads {FORMAT_VERSION}; "
            "prepare the corpus again"
        )
    if manifest.get("manifest_hash") != manifest_hash(manifest):
        raise ValueError(f"{path}: was edited or damaged since it was written; prepare the corpus again")
    return manifest


def _load_split(
    folder: Path, name: str, manifest: dict[str, Any], tokenizer: Tokenizer, store: Store | None = None
) -> Split:
    entry = manifest["splits"][name]
    path = folder / lengths_file(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; prepare the corpus again")
    if hashlib.sha256(path.read_bytes()).hexdigest() != entry["lengths_hash"]:
        raise ValueError(f"{path}: was changed or damaged since it was written; prepare the corpus again")
    where, repair = (folder, "prepare the corpus again") if store is None else (store.address, "copy the corpus again")
    sizes = (
        {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
        if store is None
        else (store.sizes())
    )
    shards = []
    for shard in entry["shards"]:
        file, size = shard["file"], sizes.get(shard["file"])
        if size is None:
            raise FileNotFoundError(f"{where}/{file}: missing; {repair}")
        if size != shard["size"]:
            raise ValueError(f"{where}/{file}: {size} bytes where the manifest says {shard['size']}; {repair}")
        remote = None if store is None else RemoteShard(store, file, size)
        shards.append((f"{where}/{file}", shard["records"], remote))
    masked = manifest.get("loss_mask", False)
    return Split(np.load(path), shards, np.dtype(manifest["token_dtype"]), tokenizer.eot, masked)
