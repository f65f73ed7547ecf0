"""DeltaFormer, 1.28 billion parameters, heads of dimension 128: the shape that accelerators multiply best.

Data: as for configs/deltaformer_340m.py, with more of it. FineWeb-edu's 100-billion-token sample is enough.

Command. The second one prints sizes and the step's memory, and allocates nothing:

    python train.py --config deltaformer_1b3 --workdir runs/deltaformer_1b3
    python train.py --config deltaformer_1b3 --dry_run

Hardware: eight accelerators of 80 GB. Each has all of the parameters and the optimiser's state, 15.4 GB; with
--config.mesh.fsdp=8 --config.mesh.data=1 they are sharded. What the backward pass keeps of a block is chosen by the
memory of the devices (model.remat = "auto"). The number of devices must divide 32, the rows of one accumulation part of
the batch.
Time: not measured. By arithmetic, 100e9 tokens at 8.89 GFLOP each, attention included, are 8.9e20 FLOP.
Result: not measured.

Chosen here, following models of that size in the literature on gated delta rules: 24 layers of width 2048, 16 heads,
SwiGLU of width 5504, tied embeddings, a vocabulary of 32,000; peak learning rate 4e-4, warm-up over 2,000 steps, cosine
schedule to a tenth of the peak, AdamW (0.9, 0.95), weight decay 0.1, batches of 0.5M tokens.
"""

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

STEPS = 190_735  # steps of 256 x 2048 tokens, 100e9 tokens in all


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=32_000,
            d_model=2048,
            num_layers=24,
            num_heads=16,
            num_kv_heads=16,
            head_dim=128,
            mlp_dim=5504,
            mixers=("delta_former",),
            rope_base=1e5,  # 1e4 is below the bound of this context: docs/results/rope_base.md
            compute_dtype="bfloat16",
            remat="auto",
        ),
        data=DataConfig(path="data/fineweb_edu", sequence_length=2048, batch_size=256),
        optimizer=OptimizerConfig(
            learning_rate=4e-4, warmup_steps=2000, decay_steps=STEPS, schedule="cosine", accumulation_steps=8
        ),
        run=RunConfig(
            steps=STEPS,
            log_every=10,
            eval_every=2000,
            eval_batches=20,
            checkpoint_every=2000,
            sample_prompt="The most important thing about",
        ),
    )
