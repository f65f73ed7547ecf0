"""The Transformer to compare configs/deltaformer_340m.py with: the same in everything but the mixer, softmax attention.

341 million parameters (DeltaFormer's gates are 0.4 million more), 15 billion tokens of FineWeb-edu, made as that file's
docstring says. Command:

    python train.py --config transformer_340m --workdir runs/transformer_340m

Hardware: as there.
Time: not measured. By arithmetic, 15e9 tokens at 2.35 GFLOP each, attention included, are 3.5e19 FLOP.
Result: not measured. In the paper's Table 2 DeltaFormer's averages over benchmarks are within noise of its.
"""

from dataclasses import replace

from deltaformer_jax.config import Config
from deltaformer_jax.config.files import packaged_config


def get_config() -> Config:
    budget = packaged_config("deltaformer_340m")
    return replace(budget, model=replace(budget.model, mixers=("softmax_attention",)))
