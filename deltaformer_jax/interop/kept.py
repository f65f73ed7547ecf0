"""What a folder says that is not its model's function, and that goes back with it: `FIELDS` of its config.json, its
model_type, its tokenizer_config.json and the dtypes of its tensors. A run that was imported has them in KEPT_FILE, with
the prefix of its tokenizer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from etils import epath

from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data import Tokenizer
from deltaformer_jax.data.tokenizer.prefix import Prefix
from deltaformer_jax.data.tokenizer.pretrained import (
    TRAINED_HERE,
    prefix_of,
    pretrained_config,
    pretrained_ends,
    pretrained_prefix,
)
from deltaformer_jax.interop.fields import of_text
from deltaformer_jax.interop.files import NAMES, Tensors, is_pretrained, read_json, usual_name
from deltaformer_jax.interop.kinds import misfits
from deltaformer_jax.interop.own import MODEL_TYPE
from deltaformer_jax.interop.sources import SOURCES

FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
# What save_pretrained(kept=) takes. Beside those: the folder's model_type; whether its file holds the table of a tied
# model a second time, as lm_head.weight; and fla's fuse_norm if it is false, by which a norm has another name.
KEPT = (*FIELDS, "model_type", "tied_head", "fuse_norm")
# Where the folder of an imported run has them.
KEPT_FILE = "pretrained.json"


def read_kept(folder: Path) -> dict[str, Any]:
    """Those of KEPT that a folder of the hub's format says, null included; tokens also in generation_config.json,
    whose eos_token_id counts. Raises ValueError, naming the file, for one of another kind."""
    found: dict[str, Any] = {}
    ends = None
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if name != "config.json" and not path.exists():
            continue
        whole = read_json(path)
        text = whole.get("text_config")
        said = whole | text if isinstance(text, dict) else whole
        said = {field: said[field] for field in FIELDS if field in said}
        if wrong := misfits(said):
            raise ValueError(f"{path}: {'; '.join(wrong)}")
        ends = ends if ends is not None else said.get("eos_token_id")
        found |= said
    text = of_text(whole)
    if text.get("model_type") in (*SOURCES, MODEL_TYPE):
        found["model_type"] = text["model_type"]
    if text.get("tie_word_embeddings") and "lm_head.weight" in Tensors(folder):
        found["tied_head"] = True
    if text.get("fuse_norm") is False:
        found["fuse_norm"] = False
    return found if ends is None else found | {"eos_token_id": ends}


def kept_of_run(workdir: epath.PathLike, sequence_length: int) -> dict[str, Any]:
    """Those of KEPT of a run: those of the folder that it was imported from. Of any other run the length of its rows,
    or more if what it began from (run.init_from) allowed more and is still there."""
    said = _of_run(workdir)
    if said is None:
        return {"max_position_embeddings": max(sequence_length, _positions_of_base(workdir))}
    return {field: said[field] for field in KEPT if field in said}


def _positions_of_base(workdir: epath.PathLike) -> int:
    """max_position_embeddings of the folder that run.init_from names; 0 if there is none or it does not say."""
    init_from = Saved.read(epath.Path(workdir)).config.run.init_from
    base = epath.Path(init_from)
    if not init_from or not (base / Saved.FILE).exists():
        return 0
    if is_pretrained(base):
        kept = read_kept(Path(init_from))
    else:
        kept = kept_of_run(base, Saved.read(base).config.data.sequence_length)
    return kept.get("max_position_embeddings") or 0


def read_dtypes(folder: Path) -> dict[str, str]:
    """The dtypes of a folder's tensors by their usual names, as `save_pretrained` takes them: "" for most of them, then
    the others. A float64 is read as float32, and comes back as such."""
    files = Tensors(folder)
    found = {usual_name(name): NAMES[files.dtype(name)] for name in files if files.dtype(name) in NAMES}
    most = Counter(found.values()).most_common(1)[0][0] if found else "float32"
    return {"": most} | {name: dtype for name, dtype in found.items() if dtype != most}


def dtypes_of_run(workdir: epath.PathLike) -> dict[str, str]:
    """`read_dtypes` of the folder that the run was imported from; float32 for a run of ours."""
    return (_of_run(workdir) or {}).get("dtypes", {"": "float32"})


def source_of_run(workdir: epath.PathLike) -> str | None:
    """The folder that the run was imported from; None for a run of ours."""
    said = _of_run(workdir)
    return None if said is None else str(said.get("source", "a folder of weights"))


def to_keep(folder: Path, tokenizer: Tokenizer, file: Path) -> dict[str, Any]:
    """The content of KEPT_FILE of a run that is imported from `folder`, whose tokenizer is in `file`."""
    config = pretrained_config(folder, file)
    config.pop("auto_map", None)  # names programs that are not copied
    prefix = pretrained_prefix(folder, tokenizer, file).settings()
    return {
        **read_kept(folder),
        "source": str(folder.resolve()),
        "ends": pretrained_ends(folder, tokenizer, file),
        "dtypes": read_dtypes(folder),
        "prefix": prefix,
        "tokenizer_config": config,
    }


def prefix_of_run(workdir: epath.PathLike, tokenizer: Tokenizer) -> Prefix:
    """What the run's model reads before a text: end-of-text, or what the folder that it was imported from says."""
    said = _of_run(workdir)
    if said is None:
        return tokenizer.prefix
    return Prefix.of(said["prefix"]) if "prefix" in said else prefix_of({}, said, tokenizer)


def ends_of_run(workdir: epath.PathLike) -> list[int]:
    """The ids that end a text beside end-of-text: those of the folder that the run was imported from."""
    return (_of_run(workdir) or {}).get("ends", [])


def tokenizer_config_of_run(workdir: epath.PathLike, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json of a run: that of the folder that it was imported from, or one by which transformers reads
    a BPE as it is and this package sees that the model was trained here. {}: there is no need of any."""
    said = _of_run(workdir)
    if said is not None:
        return said.get("tokenizer_config", {})
    names = [name for name, token in tokenizer.special_tokens.items() if token.id == tokenizer.eot]
    end = {"bos_token": names[0], "eos_token": names[0]} if names else {}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **TRAINED_HERE, **end} if end else {}


def _of_run(workdir: epath.PathLike) -> dict[str, Any] | None:
    path = epath.Path(workdir) / KEPT_FILE
    return read_json(path) if path.exists() else None
