"""DeltaFormer, 7.1 billion parameters, with grouped queries: eight key heads, each read by four query heads.

Data: as for configs/deltaformer_340m.py, with much more of it, such as FineWeb-edu's 350-billion-token sample.

Command. The second one needs no accelerator: it compiles the step for 256 TPU chips and says whether it fits.

    python train.py --config deltaformer_7b --config.mesh.fsdp=256 --workdir runs/deltaformer_7b
    python -m deltaformer_jax.compile --config deltaformer_7b --topology v5e:16x16 --mesh fsdp=256

Hardware: a pod, or some tens of accelerators of 80 GB. Parameters and optimiser's state are 85 GB and must be sharded.
Time: not measured. By arithmetic, 350e9 tokens at 46 GFLOP each, attention included, are 1.6e22 FLOP.
Result: not measured.

Chosen here: the shape that the literature calls 7B, with 32 layers of width 4096, 32 query heads of dimension 128,
SwiGLU of width 14336, tied embeddings, a vocabulary of 32,000; documents packed into 4096 tokens; peak learning rate
3e-4, warm-up over 2,000 steps, cosine schedule to a tenth of the peak, AdamW (0.9, 0.95), weight decay 0.1, batches of
4.2M tokens.
"""

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

STEPS = 83_446  # steps of 1024 x 4096 tokens, 350e9 tokens in all


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=32_000,
            d_model=4096,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            mlp_dim=14_336,
            mixers=("delta_former",),
            rope_base=1e5,  # 1e4 is below the bound of this context: docs/results/rope_base.md
            compute_dtype="bfloat16",
            remat="block",
        ),
        data=DataConfig(path="data/fineweb_edu", sequence_length=4096, batch_size=1024),
        optimizer=OptimizerConfig(
            learning_rate=3e-4, warmup_steps=2000, decay_steps=STEPS, schedule="cosine", accumulation_steps=4
        ),
        run=RunConfig(
            steps=STEPS,
            log_every=10,
            eval_every=2000,
            eval_batches=20,
            checkpoint_every=1000,
            sample_prompt="The most important thing about",
        ),
    )
