"""Gated linear attention at the size and on the data of configs/deltaformer_340m.py, to compare it with.

342 million parameters (the feed-forward's width makes up for the mixer's), 15 billion tokens of FineWeb-edu, made as
that file's docstring says. Command:

    python train.py --config gla_340m --workdir runs/gla_340m

Hardware: as there.
Time: not measured. By arithmetic, 15e9 tokens at 2.09 GFLOP each are 3.1e+19 FLOP.
Result: not measured.
"""

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

STEPS = 28_610  # of 256 x 2048 tokens: 15.0e9


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=32_000,
            d_model=1024,
            num_layers=24,
            num_heads=4,
            num_kv_heads=4,
            head_dim=128,
            value_dim=256,
            mlp_dim=2816,
            mixers=("gated_linear_attention",),
            compute_dtype="bfloat16",
            remat="block",
        ),
        data=DataConfig(path="data/fineweb_edu", sequence_length=2048, batch_size=256),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=1000, decay_steps=STEPS, schedule="cosine", accumulation_steps=4
        ),
        run=RunConfig(
            steps=STEPS,
            log_every=10,
            eval_every=1000,
            eval_batches=20,
            checkpoint_every=1000,
            sample_prompt="The most important thing about",
        ),
    )
