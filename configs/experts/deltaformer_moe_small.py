"""DeltaFormer with a mixture of experts, small: 41 million parameters, of which a token uses 13 million.

The smallest form of the paper's models of 14 billion parameters, whose gain is on code: a loss of 1.283 for the
Transformer's 1.312 after 500 billion tokens, and 1.810 for 1.815 on text (NeurIPS version, Tables 3 and 4). Its ratio
of 4 query heads to a KV head is kept. configs/experts/transformer_moe_small.py is the Transformer to compare with.

Data: text of your own, such as a corpus of code and one of prose, prepared as in deltaformer_340m.py. Without another
path it is the standard library's text, as bytes. Commands:

    python train.py --config experts/deltaformer_moe_small --config.data.path=data/code --workdir runs/moe_small
    python train.py --config experts/deltaformer_moe_small --dry_run

Devices along mesh.expert share the experts: --config.mesh.expert=8 on eight devices.
Hardware: the dry run prints the memory that a step takes. Time and result: not measured.
`python -m deltaformer_jax.reproduce experts` is the comparison for a laptop (docs/results/experts.md).

Chosen here: 8 layers of width 384, 12 query heads of 32 over 3 KV heads, 8 experts of which 2 are used, as wide
together as the dense layer; the balance loss of Switch Transformers with weight 0.01; AdamW as in deltaformer_340m.py.
"""

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

STEPS = 10_000  # steps of 64 x 512 tokens, 328 million tokens in all


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            d_model=384,
            num_layers=8,
            num_heads=12,
            num_kv_heads=3,
            head_dim=32,
            mixers=("delta_former",),
            rope_base=1e5,  # 1e4 is below the bound of this context: docs/results/rope_base.md
            feed_forward="moe",
            num_experts=8,
            experts_per_token=2,
            compute_dtype="bfloat16",
        ),
        data=DataConfig(sequence_length=512, batch_size=64),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=500, decay_steps=STEPS, schedule="cosine"),
        run=RunConfig(steps=STEPS, log_every=10, eval_every=500, eval_batches=20, checkpoint_every=500),
    )
