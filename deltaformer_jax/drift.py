"""How far a run's model has moved from another one's, layer by layer:

    python -m deltaformer_jax.drift --teacher DIR --workdir DIR2 [--data PATH] [--sequence_length N] [--batches N]

similarity   the mean cosine of the residual streams after a layer, on the same tokens
read, write  the mean KL of the attention weights, the teacher's against the model's; DeltaFormer has both, other
             softmax attention a read alone, other mixers none, nor has a read with a position bias

Both runs have one architecture and one tokenizer; the rotary embedding may differ. The data is the evaluation split of
DIR2's data, or of --data as in `evaluate`, in rows of the teacher's length or of --sequence_length. A table goes to
stderr, one line of JSON to stdout; nothing is written. Wrong input gives one line on stderr and exit code 2.

Source: the measures of "LongReD", Dong et al., arXiv 2502.07365.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from etils import epath

from deltaformer_jax.config.argument_parser import ArgumentParser
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.host.columns import right_aligned
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.waiting import say_aside, waiting


def main(arguments: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m deltaformer_jax.drift",
        description="How far a run's model has moved from another one's, layer by layer.",
    )
    parser.add_argument("--teacher", type=expand, required=True, metavar="DIR", help="the folder of the run before")
    parser.add_argument("--workdir", type=expand, required=True, metavar="DIR2", help="the folder of the run after")
    parser.add_argument("--data", type=expand, metavar="PATH", help="text, as in evaluate (default: DIR2's data)")
    parser.add_argument("--sequence_length", type=int, metavar="N", help="tokens per row (default: the teacher's)")
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="batches to measure on (default: 4)")
    flags = parser.parse_args(arguments)
    with one_line_errors("deltaformer_jax.drift"), tempfile.TemporaryDirectory() as folder:
        for name in ("sequence_length", "batches"):
            if getattr(flags, name) is not None and getattr(flags, name) < 1:
                raise ValueError(f"--{name} {getattr(flags, name)}: give 1 or more")
        Saved.read(epath.Path(flags.teacher)), Saved.read(epath.Path(flags.workdir))  # before jax is imported
        print(json.dumps(measure(flags, Path(folder))))


def measure(flags, folder: Path) -> dict[str, Any]:
    """What is printed."""
    with waiting("importing jax", say_aside):
        from deltaformer_jax.evaluate.corpus import evaluation_corpus
        from deltaformer_jax.extension.report import layer_drift
        from deltaformer_jax.training.checkpoints.restore import restore
        from deltaformer_jax.training.objectives.teacher_model import check_same_architecture

    with waiting("restoring both models", say_aside):
        before, after = restore(flags.teacher, note=say_aside), restore(flags.workdir, note=say_aside)
    check_same_architecture(before.config.model, after.config.model, f"--teacher {flags.teacher}")
    if before.tokenizer.hash != after.tokenizer.hash:
        raise ValueError(f"--teacher {flags.teacher}: has another tokenizer than {flags.workdir}")
    with waiting("reading the data", say_aside):
        corpus = evaluation_corpus(after, flags.data, folder)
    length = flags.sequence_length or before.config.data.sequence_length
    with waiting("measuring the layers", say_aside):
        found = layer_drift(before, after, corpus, length, flags.batches)
    lines = [("layer", *found)]
    for layer, values in enumerate(zip(*found.values())):
        lines.append((str(layer), *("-" if value is None else f"{value:.4f}" for value in values)))
    print(right_aligned(lines), file=sys.stderr)
    return {"teacher_step": before.step, "step": after.step, "sequence_length": length, **found}


if __name__ == "__main__":
    main()
