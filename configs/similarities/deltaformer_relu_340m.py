"""DeltaFormer with the write similarity relu, κ₁ = max(s, 0); all else, the read too, as in deltaformer_340m.py.

One of the four similarities of the paper's Table 2, whose averages over benchmarks are within noise of each other. The
scores of the write are cosines of keys (write_key_norm), as for every similarity but softmax. The docstring of
deltaformer_340m.py says how to prepare the data. Command:

    python train.py --config similarities/deltaformer_relu_340m --workdir runs/deltaformer_relu_340m

Time and result: not measured.
"""

from dataclasses import replace

from deltaformer_jax.config import Config
from deltaformer_jax.config.files import packaged_config


def get_config() -> Config:
    budget = packaged_config("deltaformer_340m")
    return replace(budget, model=replace(budget.model, write_similarity="relu"))
