"""RWKV-7's mixer with the size and the data of configs/deltaformer_340m.py, for comparison with it.

340 million parameters, 15 billion tokens of FineWeb-edu. The feed-forward width is chosen to give that number. The
docstring of deltaformer_340m.py says how to prepare the data. Command:

    python train.py --config delta_rules/rwkv7_340m --workdir runs/rwkv7_340m

Hardware: see deltaformer_340m.py.
Time: not measured. By arithmetic, 15e9 tokens at 2.12 GFLOP each are 3.2e+19 FLOP.
Result: not measured.
"""

from dataclasses import replace

from deltaformer_jax.config import Config
from deltaformer_jax.config.files import packaged_config


def get_config() -> Config:
    budget = packaged_config("deltaformer_340m")
    return replace(
        budget,
        model=replace(
            budget.model,
            mixers=("rwkv7",),
            rope_base=1e4,  # the default: these layers have no rotary embedding
            num_heads=8,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=2560,
        ),
    )
