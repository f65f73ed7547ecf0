"""Folders of weights as the Hugging Face hub has them: config.json, and safetensors in one file or in shards.

Tensors are read one at a time from a file that is mapped into memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

ONE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
# The dtypes of files that are read, and as which of DTYPES they come back.
NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float32"}
FLOATS = tuple(NAMES)
# How the small file begins that stands for a large one in a clone without Git LFS.
_POINTER = b"version https://git-lfs."
_BLOCK_BYTES = 16 * 10**6
# How the names of tensors end that older files hold, and that classes compute from their configs.
BUFFER = "rotary_emb.inv_freq"
_OF_TEXT = "model.language_model."


def is_pretrained(folder: Any) -> bool:
    """Whether a folder's config.json is one of the hub's, not a run's of ours."""
    path = folder / "config.json"
    try:
        return path.exists() and "model_type" in json.loads(path.read_text())
    except ValueError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError, naming the file, for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give a folder with config.json and safetensors") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not an object")
    return found


def check_folder(folder: Path) -> None:
    """Raise FileNotFoundError, NotADirectoryError or ValueError, naming the folder, if it has no weights to read."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file; give a folder with config.json and safetensors")
    refuse_run(folder, read_json(folder / "config.json"))
    _files(folder)


def refuse_run(folder: Path, values: dict[str, Any]) -> None:
    """Raise ValueError if config.json holds the values of a run's."""
    if "tokenizer_hash" in values and "model_type" not in values:
        raise ValueError(
            f"{folder}: is a run's folder, with no weights of the hub's format; write those with python -m "
            f"deltaformer_jax.convert --to-hf --workdir {folder} --out FOLDER"
        )


def usual_name(name: str) -> str:
    """A tensor's name in a model of text alone, from that in a multimodal file."""
    return "model." + name.removeprefix(_OF_TEXT) if name.startswith(_OF_TEXT) else name


class Tensors:
    """The tensors of a folder by name: `shape(name)`, `dtype(name)`, and `tensors[name]`, an array read at that moment.

    One file is mapped into memory at a time, so that what was read of the others does not stay there.
    """

    def __init__(self, folder: Path):
        self._found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        self._path, self._file = None, None
        for path in _files(folder):
            opened = _open(path)
            for name in opened.keys():
                if name in self._found:
                    raise ValueError(f"{path}: {name} is in another file of {folder} too")
                part = opened.get_slice(name)
                self._found[name] = (path, tuple(part.get_shape()), part.get_dtype())

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._found[name][1]

    def dtype(self, name: str) -> str:
        """As safetensors names it: "F32", "BF16", ..."""
        return self._found[name][2]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._mapped(name).get_tensor(name)

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Write the tensor to `out`, of its shape and any dtype. Beside the mapped file this takes some megabytes."""
        if not out.ndim:
            out[...] = self[name]
            return
        for rows, part in self._blocks(name, out):
            out[rows] = part

    def equals(self, name: str, array: np.ndarray) -> bool:
        """Whether the tensor has the values of an array of its shape. This takes memory as `read_into` does."""
        return all(np.array_equal(part, array[rows], equal_nan=True) for rows, part in self._blocks(name, array))

    def _blocks(self, name: str, like: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        part = self._mapped(name).get_slice(name)
        rows = max(1, _BLOCK_BYTES * len(like) // max(1, like.nbytes))
        for begin in range(0, len(like), rows):
            end = min(begin + rows, len(like))
            yield slice(begin, end), part[begin:end].astype(like.dtype, copy=False)

    def _mapped(self, name: str) -> Any:
        path = self._found[name][0]
        if path != self._path:
            self.close()  # before the next is mapped
            self._path, self._file = path, _open(path)
        return self._file

    def close(self) -> None:
        """Unmap the file that was read last."""
        self._path, self._file = None, None


def _open(path: Path):
    try:
        return safe_open(path, "numpy")
    except SafetensorError as error:
        with path.open("rb") as file:
            pointer = file.read(len(_POINTER)) == _POINTER
        why = "a pointer of Git LFS; get the file itself with git lfs pull" if pointer else error
        raise ValueError(f"{path}: not a safetensors file: {why}") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {'a folder' if path.is_dir() else error}") from None


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        placed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
            raise ValueError(f"{folder / INDEX}: weight_map must name the file of each tensor, not {placed!r:.80}")
        shards = sorted(set(placed.values()))
        outside = [name for name in shards if Path(name).name != name]
        if outside:
            raise ValueError(f"{folder / INDEX}: names a file outside the folder: {outside[0]!r}")
        missing = [name for name in shards if not (folder / name).exists()]
        if missing:
            raise FileNotFoundError(f"{folder}: shards of {INDEX} are missing: {', '.join(missing)}")
        return [folder / name for name in shards]
    if (folder / ONE).exists():
        return [folder / ONE]
    pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLES]
    if pickles:
        raise ValueError(
            f"{folder}: {pickles[0]} is a pickle, which can run any program when it is read; convert it to "
            "safetensors where it comes from"
        )
    others = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".gguf")]
    if ADAPTER in others:
        raise ValueError(f"{folder}: holds adapters alone, {ADAPTER}; add them to their model where they come from")
    there = f"; {others[0]} is not read" if others else ""
    raise FileNotFoundError(f"{folder}: holds neither {ONE} nor {INDEX}{there}")


def write(folder: Path, tensors: Mapping[str, Any], names: list[str], size_of, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the tensors `names`, made one shard at a time by tensors[name], of which size_of(name) says the bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name in names:
        if shards[-1] and filled + size_of(name) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size_of(name)
    placed = {}
    for number, shard in enumerate(shards, 1):
        file = ONE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: np.ascontiguousarray(tensors[name]) for name in shard}, folder / file, {"format": "pt"})
        placed |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(size_of, names))}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
