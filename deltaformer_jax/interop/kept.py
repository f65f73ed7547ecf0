"""What a folder says that is not its model's function, and that goes back with it: `FIELDS` of its config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from etils import epath

from deltaformer_jax.interop.files import read_json
from deltaformer_jax.interop.kinds import misfits

FIELDS = ("bos_token_id", "max_position_embeddings")
# Where the folder of an imported run has them.
KEPT_FILE = "pretrained.json"


def read_kept(folder: Path) -> dict[str, Any]:
    """Those of FIELDS that a folder of the hub's format says, null included; the first token also in
    generation_config.json. Raises ValueError, naming the file, for one of another kind."""
    found: dict[str, Any] = {}
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
        found |= said
    return found


def kept_of_run(workdir: epath.PathLike, sequence_length: int) -> dict[str, Any]:
    """Those of FIELDS of a run: those of the folder that it was imported from, or else the length of its rows."""
    path = epath.Path(workdir) / KEPT_FILE
    return json.loads(path.read_text()) if path.exists() else {"max_position_embeddings": sequence_length}
