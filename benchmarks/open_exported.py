"""Opens folders that `save_pretrained` wrote in the classes of the packages that they are for.

    python benchmarks/open_exported.py write OUT     # here: reads and writes the models of tests/fixtures/pretrained
    python benchmarks/open_exported.py open OUT      # in an environment with torch, transformers and fla

The second command builds each class from config.json and loads the tensors strictly: none may be missing, unknown or of
another shape. For models of the package transformers it also compares the logits: with those of the fixture, whose
random weights the exported folder holds, and for Llamas with a scaled rotary embedding with ours. fla's classes need a
GPU to run; they are only opened.

The second environment needs no GPU. It is one of two, because transformers takes fla's kernels where fla is installed:

    pip install torch transformers safetensors                                  # open OUT --only hf
    pip install torch transformers safetensors triton einops                    # open OUT --only fla
    pip install --no-deps fla-core flash-linear-attention
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

# Scalings of the fixture's Llama, whose case has fewer than 64 tokens.
SCALINGS = ("linear:4", "yarn:4,8", "llama3:8,1,4,8")
FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures" / "pretrained"


def write_all(out: Path) -> None:
    from deltaformer_jax.interop import load_pretrained, save_pretrained

    for folder in sorted(FIXTURES.iterdir()):
        model, config = load_pretrained(folder)
        kind = save_pretrained(model, config, out / folder.name)
        shutil.copy(folder / "io.safetensors", out / folder.name)
        print(f"{folder.name}: a {kind}", flush=True)
    for scaling in SCALINGS:
        write_scaled(out / f"hf_llama_{scaling.partition(':')[0]}", scaling)


def write_scaled(folder: Path, scaling: str) -> None:
    """The fixture's Llama with a scaled rotary embedding, and the logits that it has here."""
    import dataclasses

    import jax
    from flax import nnx
    from safetensors.numpy import load_file, save_file

    from deltaformer_jax.interop import load_pretrained, save_pretrained
    from deltaformer_jax.model_parts import model_parts, params_of

    model, config = load_pretrained(FIXTURES / "hf_llama")
    config = dataclasses.replace(config, rope_scaling=scaling)
    scaled = nnx.merge(model_parts(config).graphdef, nnx.State(params_of(model)))
    kind = save_pretrained(scaled, config, folder)
    case = load_file(FIXTURES / "hf_llama" / "io.safetensors")
    with jax.default_matmul_precision("highest"):
        logits, _ = scaled(case["tokens"])
    save_file({"tokens": case["tokens"], "logits": jax.device_get(logits)}, folder / "io.safetensors")
    print(f"{folder.name}: a {kind}", flush=True)


def open_all(out: Path, package: str) -> int:
    """The number of folders of the package that do not open."""
    import json
    import types

    import torch
    import transformers
    from safetensors.torch import load_file

    # fla's attention layers ask for this package, which needs a GPU to be installed, when they are made.
    flash = types.ModuleType("flash_attn")
    flash.flash_attn_func = flash.flash_attn_varlen_func = lambda *_: NotImplemented
    flash.__spec__ = types.SimpleNamespace(name="flash_attn", loader=None, submodule_search_locations=None)
    if package == "fla":
        sys.modules["flash_attn"] = flash
    failed = 0
    for folder in sorted(out.glob(f"{package}_*")):
        said = json.loads((folder / "config.json").read_text())
        try:
            if folder.name.startswith("fla_"):
                import fla.models

                config = transformers.AutoConfig.from_pretrained(folder)
                model = getattr(fla.models, said["architectures"][0])(config)
                model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
                print(f"{folder.name}: opens in {type(model).__name__}", flush=True)
                continue
            kind = getattr(transformers, said["architectures"][0])
            config = transformers.AutoConfig.from_pretrained(folder)
            model, info = kind.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
            wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
            if wrong:
                raise ValueError(str(wrong))
            case = load_file(folder / "io.safetensors")
            with torch.no_grad():
                logits = model(case["tokens"].long()).logits
            apart = float((logits - case["logits"]).abs().max() / case["logits"].abs().max())
            if not apart <= 1e-5:
                raise ValueError(f"logits differ by {apart:.1e} of the largest")
            print(f"{folder.name}: opens in {kind.__name__}, logits to {apart:.0e}", flush=True)
        except Exception as error:
            failed += 1
            print(f"{folder.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("write", "open"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("hf", "fla"), default="*")
    flags = parser.parse_args()
    if flags.do == "write":
        write_all(flags.folder)
    else:
        sys.exit(min(open_all(flags.folder, flags.only), 1))


if __name__ == "__main__":
    main()
