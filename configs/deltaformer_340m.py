"""DeltaFormer, 341 million parameters, 15 billion tokens of FineWeb-edu: the sizes of the paper's section 4.3.

Data. Prepare it once. Put parquet files of FineWeb-edu (HuggingFaceFW/fineweb-edu) with about 16 billion tokens into a
folder; 2 % of them are kept for evaluation. Only the column "text" is read. Then run

    python -m deltaformer_jax.data.prepare FOLDER --out data/fineweb_edu --tokenizer bpe:32000 --workers 32

It learns a tokenizer of 32,000 tokens from a sample of the training documents, and writes at most 32 GB. If it is
stopped, the same command resumes it. It prints the number of training tokens; with fewer than 15 billion the run sees
some of them twice. To mix in other text, prepare that with --tokenizer data/fineweb_edu/tokenizer.json and set
--config.data.path=data/fineweb_edu=0.8,data/code=0.2 (fractions of the tokens).

Command. The second one prints sizes and the step's memory, and allocates nothing:

    python train.py --config deltaformer_340m --workdir runs/deltaformer_340m
    python train.py --config deltaformer_340m --dry_run

Hardware: eight accelerators. The dry run, compiled for eight CPU devices (JAX_NUM_CPU_DEVICES=8), needs 10.8 GiB on
each, 3.8 GiB of which are the state (docs/performance.md has these figures for every config). The number of devices
must divide 64, the rows of one accumulation part of the batch. With fewer or smaller devices raise
--config.optimizer.accumulation_steps; the batch and the result stay the same. --config.mesh.fsdp also shards the state.
Time: not measured. By arithmetic, 15e9 tokens at 2.65 GFLOP each, attention included, are 4.0e19 FLOP.
Result: not measured. In the paper's Table 2 the averages over benchmarks are within noise of the Transformer's, for
linear, relu, round and softmax writes. configs/transformer_340m.py is the Transformer to compare with.

From the paper: 340M parameters, 15B tokens, peak learning rate 2e-3, context 2048, batches of 0.5M tokens. Chosen here,
following models of that size in the literature on gated delta rules: 24 layers of width 1024, 16 heads of dimension 64,
SwiGLU of width 2816, tied embeddings, a vocabulary of 32,000; warm-up over 1,000 steps, cosine schedule to a tenth of
the peak, AdamW (0.9, 0.95), weight decay 0.1.
"""

from deltaformer_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, RunConfig

STEPS = 28_610  # steps of 256 x 2048 tokens, 15.0e9 tokens in all


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=32_000,
            d_model=1024,
            num_layers=24,
            num_heads=16,
            num_kv_heads=16,
            head_dim=64,
            mlp_dim=2816,
            mixers=("delta_former",),
            rope_base=1e5,  # 1e4 is below the bound of this context: docs/results/rope_base.md
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
