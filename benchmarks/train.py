"""Where the time of a training step goes: the whole step, loss, gradient and update, of a config.

    uv run --extra cuda --group kernels python benchmarks/train.py --config NAME [--config.section.field=value ...]
        [--batch N] [--remat NAME] [--device h100] [--json FILE]

With an NVIDIA GPU it runs the step on random tokens: tokens a second, milliseconds of a step (the median) and by part,
MFU. training_step/timed.py does it.

Without one, or with --device h100, nothing runs. The step is compiled for one H100 ahead of time, and the compiled
program is counted: launches, bytes, FLOPs, and the roofline, which is the least time that the card's memory and matrix
units need for them. A real step takes longer: the roofline's tokens a second and MFU are upper bounds. A config of 340
million parameters takes about a minute to compile. It needs the compiler of JAX's CUDA plugin and Triton, but no CUDA
library and no GPU. training_step/counted.py does it.

training_step/parts.py says what the parts are.

--config NAME   a config by name, as in train.py, whose flags --config.section.field=value work here too
--batch N       N rows in one part: data.batch_size = N, optimizer.accumulation_steps = 1
--remat NAME    model.remat
--device h100   count for an H100, even if there is a GPU
--json FILE     also write the tables here
"""

from __future__ import annotations

import argparse
import glob
import importlib
import importlib.metadata
import importlib.util
import os

from absl import flags as absl_flags

from deltaformer_jax.config.command_line import parse
from deltaformer_jax.config.errors import one_line_errors
from deltaformer_jax.config.files import config_folder

PROGRAM = "benchmarks/train.py"


def main():
    parser = argparse.ArgumentParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--remat")
    parser.add_argument("--device", choices=("h100",))
    parser.add_argument("--json")
    flags, rest = parser.parse_known_args()
    if flags.batch is not None:
        rest += [f"--config.data.batch_size={flags.batch}", "--config.optimizer.accumulation_steps=1"]
    if flags.remat is not None:
        rest.append(f"--config.model.remat={flags.remat}")
    count = bool(flags.device) or not gpu_here()
    if count:  # before jax is imported
        os.environ.update(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="-1")
    with one_line_errors(PROGRAM, (ValueError, OSError, NotImplementedError, absl_flags.Error)):
        config = parse([PROGRAM, *rest], str(config_folder() / "tiny.py")).config
        if count:
            check_compiler()
        way = importlib.import_module(f"training_step.{'counted' if count else 'timed'}")
        step = way.prepare(config)
    way.show(step, flags.json)


def gpu_here() -> bool:
    """Whether this machine has an NVIDIA GPU and jax may use it. Asking jax would start its back ends."""
    return bool(glob.glob("/dev/nvidia[0-9]*")) and os.environ.get("JAX_PLATFORMS") != "cpu"


def check_compiler():
    """Raise ValueError if the packages are missing that compile a program for an H100."""
    here = lambda *names: any(importlib.util.find_spec(name) is not None for name in names)
    if here("jax_cuda12_plugin", "jax_cuda13_plugin") and here("triton") and here("jax_triton"):
        return
    jax = importlib.metadata.version("jax")
    raise ValueError(
        "there is no GPU here, and no compiler for one: pip install --no-deps "
        f"jax-cuda12-plugin=={jax} jax-cuda12-pjrt=={jax} 'triton>=3.6,<3.7' 'jax-triton>=0.3.1,<0.4'"
    )


if __name__ == "__main__":
    main()
