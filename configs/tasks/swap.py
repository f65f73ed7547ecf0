"""A DeltaFormer of one layer learns to track five elements through swaps, the task of the paper's Figure 3.

Command:    python train.py --config tasks/swap
Hardware:   two CPU cores, no accelerator.
Time:       under a minute on busy cores.
Result:     accuracy 1.0000 on the evaluation split after 1,000 steps of 64 rows of 16 swaps. On rows of 64 swaps, four
            times the length in training, 0.9965 (python -m deltaformer_jax.evaluate --workdir DIR --sequence_length
            64).

The write's keys are not normalised and there is no rotary embedding, as in the paper's `round` without RoPE.
"""

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            d_model=128,
            num_layers=1,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            mixers=("delta_former",),
            tie_embeddings=False,
            rope_base=0.0,
            write_similarity="round",
            write_key_norm="off",
            chunk_size=64,
        ),
        data=DataConfig(path="task:swap,elements=5", sequence_length=16, batch_size=64),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, decay_steps=1000, weight_decay=0.0),
        run=RunConfig(steps=1000, log_every=100, eval_every=250, checkpoint_every=500),
    )
