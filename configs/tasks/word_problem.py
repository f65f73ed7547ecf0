"""A DeltaFormer of three layers learns to multiply permutations of three elements, the word problem of S3.

Command:    python train.py --config tasks/word_problem
Hardware:   two CPU cores, no accelerator.
Time:       two minutes on busy cores.
Result:     accuracy 0.9999 on the evaluation split after 1,200 steps of 64 rows. One layer reaches 0.67 after 1,000
            steps: a rotation of all three elements consists of two swaps, and a layer writes one swap per token.

Harder problems are --config.data.path=task:word_problem,group=S5, and the groups A5, S4 and A4. On S5 one layer reaches
0.08 after 2,000 steps. With moves=2 the words consist of swaps only, and one layer is enough
(docs/results/word_problem.md).
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
