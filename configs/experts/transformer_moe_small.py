"""The Transformer to compare experts/deltaformer_moe_small.py with: softmax attention, and everything else the same.

41 million parameters, of which a token uses 13 million. Command:

    python train.py --config experts/transformer_moe_small --config.data.path=data/code --workdir runs/control

Time and result: not measured.
"""

from dataclasses import replace

from deltaformer_jax.config import Config
from deltaformer_jax.config.files import packaged_config


def get_config() -> Config:
    budget = packaged_config("experts/deltaformer_moe_small")
    return replace(budget, model=replace(budget.model, mixers=("softmax_attention",)))
