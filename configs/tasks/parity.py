"""A DeltaFormer of one layer learns parity on strings of up to 40 bits, and generalises to strings of up to 500 bits.

Command:    python train.py --config tasks/parity
Hardware:   two CPU cores, no accelerator.
Time:       about a minute on busy cores.
Result:     accuracy 1.0000 on the evaluation split after 600 steps of 64 strings, and 1.0000 on 1,024 strings of 41 to
            500 bits (python -m deltaformer_jax.evaluate --workdir DIR --data task:parity,shortest=41,longest=500
            --sequence_length 501 --batch_size 32).
"""

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            d_model=64,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=32,
            mixers=("delta_former",),
            tie_embeddings=False,
            rope_base=0.0,
            write_similarity="round",
            write_key_norm="off",
            chunk_size=64,
        ),
        data=DataConfig(path="task:parity,longest=40", sequence_length=41, batch_size=64),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100, decay_steps=600, weight_decay=0.0),
        run=RunConfig(steps=600, log_every=100, eval_every=200, checkpoint_every=200),
    )
