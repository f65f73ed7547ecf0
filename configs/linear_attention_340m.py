"""Linear attention with the size and the data of configs/deltaformer_340m.py, for comparison with it.

341 million parameters, 15 billion tokens of FineWeb-edu. The docstring of deltaformer_340m.py says how to prepare the
data. Command:

    python train.py --config linear_attention_340m --workdir runs/linear_attention_340m

Hardware: see deltaformer_340m.py.
Time: not measured. By arithmetic, 15e9 tokens at 2.07 GFLOP each are 3.1e+19 FLOP.
Result: not measured.
"""

from dataclasses import replace

from deltaformer_jax.config import Config
from deltaformer_jax.config.files import packaged_config


def get_config() -> Config:
    budget = packaged_config("deltaformer_340m")
    # rope_base at its default: these layers have no rotary embedding.
    return replace(budget, model=replace(budget.model, mixers=("linear_attention",), rope_base=1e4))
