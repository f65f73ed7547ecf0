"""A DeltaFormer of three layers multiplies permutations of three things: the word problem of S3.

Command:    python train.py --config tasks/word_problem
Hardware:   two CPU cores, no accelerator.
Time:       two minutes on busy cores.
Result:     accuracy 0.9999 on the evaluation split after 1,200 steps of 64 rows. One layer has 0.67 after 1,000 steps:
            a token that turns all three is two swaps, and a layer writes one at a time.

--config.data.path=task:word_problem,group=S5 (or A5, S4, A4) are the harder ones: one layer has 0.08 on S5 after 2,000.
With moves=2 besides, words of its swaps alone, one layer is enough (docs/results/word_problem.md).
"""

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            d_model=128,
            num_layers=3,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            mixers=("delta_former",),
            tie_embeddings=False,
            write_similarity="round",
            write_key_norm="off",
            chunk_size=64,
        ),
        data=DataConfig(path="task:word_problem,group=S3", sequence_length=16, batch_size=64),
        optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=100, decay_steps=1200, weight_decay=0.0),
        run=RunConfig(steps=1200, log_every=100, eval_every=300, checkpoint_every=300),
    )
