"""tiny."""

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(d_model=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32),
        data=DataConfig(sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=30, decay_steps=600),
        run=RunConfig(steps=600, eval_every=200, eval_batches=40, checkpoint_every=200),
    )
