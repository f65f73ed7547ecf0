"""The Transformer to compare configs/deltaformer_340m.py with: softmax attention, and everything else the same.

341 million parameters, 15 billion tokens of FineWeb-edu. DeltaFormer has 0.4 million parameters more, in its gates. The
docstring of deltaformer_340m.py says how to prepare the data. Command:

    python train.py --config transformer_340m --workdir runs/transformer_340m

Hardware: see deltaformer_340m.py.
Time: not measured. By arithmetic, 15e9 tokens at 2.35 GFLOP each, attention included, are 3.5e19 FLOP.
Result: not measured. In the paper's Table 2 the averages over benchmarks of Transformer and DeltaFormer differ by no
more than noise.
"""

from dataclasses import replace

from deltaformer_jax.config import Config
from deltaformer_jax.config.files import packaged_config


def get_config() -> Config:
    budget = packaged_config("deltaformer_340m")
    return replace(budget, model=replace(budget.model, mixers=("softmax_attention",)))
