"""The memory that reading a model takes."""

import os
import subprocess
import sys

import pytest
from flax import nnx

from deltaformer_jax import LanguageModel, ModelConfig
from deltaformer_jax.interop import save_pretrained

SHARD = 250_000_000
# VmHWM is the peak of this program alone. ru_maxrss is not: on Linux a process begins with that of its parent.
READ = """
import sys
import jax
from flax import nnx
from deltaformer_jax.interop import load_pretrained
read = lambda field: next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
load_pretrained(sys.argv[1])  # a small one: what the program itself takes
before = read("VmRSS")
model, _ = load_pretrained(sys.argv[2])
leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
print(read("VmHWM") - before, sum(leaf.nbytes for leaf in leaves))
"""


@pytest.mark.rare  # writes 1.2 GB
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "mixer", "dtype"),
    [
        ("deltaformer_jax", "delta_former", "float32"),
        ("llama", "softmax_attention", "float32"),
        ("llama", "softmax_attention", "bfloat16"),
    ],
)
def test_peak_memory_is_the_model_and_little_more_than_one_shard(tmp_path, kind, mixer, dtype):
    sizes = dict(d_model=1024, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=64)
    for name, config in {
        "small": ModelConfig(vocab_size=64, num_layers=1, mixers=(mixer,), embedding_scale="one"),
        "large": ModelConfig(vocab_size=32000, mlp_dim=4096, mixers=(mixer,), embedding_scale="one", **sizes),
    }.items():
        model = LanguageModel(config, rngs=nnx.Rngs(0))
        save_pretrained(model, config, tmp_path / name, model_type=kind, dtype=dtype, shard_bytes=SHARD)
    files = [path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors")]
    assert len(files) >= 3
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", READ, tmp_path / "small", tmp_path / "large"]
    grown, model = map(int, subprocess.run(command, env=environment, capture_output=True, check=True).stdout.split())
    print(f"{kind} {dtype}: {grown / 1e9:.3f} GB for {model / 1e9:.3f} GB, shards of up to {max(files) / 1e9:.3f} GB")
    assert model > 1e9
    assert model <= grown <= model + 1.2 * max(files), f"{grown / 1e9:.2f} GB for a model of {model / 1e9:.2f} GB"
