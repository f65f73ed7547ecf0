"""Retention (RetNet) with the size and the data of configs/deltaformer_340m.py, for comparison with it.

343 million parameters, 15 billion tokens of FineWeb-edu. The feed-forward width is chosen to give that number. The
docstring of deltaformer_340m.py says how to prepare the data. Command:

    python train.py --config retention_340m --workdir runs/retention_340m

Hardware: see deltaformer_340m.py.
Time: not measured. By arithmetic, 15e9 tokens at 2.13 GFLOP each are 3.2e+19 FLOP.
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
            mixers=("retention",),
            rope_base=1e4,
            num_heads=4,
            num_kv_heads=4,
            head_dim=256,
            value_dim=256,
            mlp_dim=2496,
        ),
    )
