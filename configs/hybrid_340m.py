"""Three layers of Gated DeltaNet to one of softmax attention, at the size and on the data of deltaformer_340m.py.

342 million parameters (the feed-forward's width makes up for the mixer's), 15 billion tokens of FineWeb-edu, made as
that file's docstring says. Command:

    python train.py --config hybrid_340m --workdir runs/hybrid_340m

Hardware: as there.
Time: not measured. By arithmetic, 15e9 tokens at 2.17 GFLOP each are 3.3e+19 FLOP.
Result: not measured.
"""

from dataclasses import replace

from deltaformer_jax.config import Config, Mixer
from deltaformer_jax.config.files import packaged_config


def get_config() -> Config:
    budget = packaged_config("deltaformer_340m")
    return replace(
        budget,
        model=replace(
            budget.model,
            mixers=("gated_delta_net",) * 3 + (Mixer("softmax_attention", num_heads=16, num_kv_heads=16, head_dim=64),),
            num_heads=8,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=2560,
        ),
    )
