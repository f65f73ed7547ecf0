"""How busy a TPU's matrix units are according to the compiler's schedule. No TPU is needed.

    JAX_PLATFORMS=cpu uv run --group kernels python benchmarks/tpu_schedule.py [--tpu v5e] [--length 8192] [--json FILE]

Takes two or three minutes. Compiles the kernels of delta_attention (8 heads of 128, bfloat16) and of the gated delta
rule, and JAX's splash attention without a mask, for the same TPU. Counts instruction bundles, one per cycle where
nothing stalls, and the slots that each unit uses in them.

step           one tile of 512 rows and 512 earlier columns; for splash attention 512×512 too, masks and sums included
chunk          what every 512 rows take once: their own tile, the triangular system, gates, loads and stores. For the
               gated ops, which have no steps, a group of four chunks of 128 rows
all            one head of the whole length: T/512 chunks and the steps between them
of peak        (v5e, v5p) cycles that the products of the formula need at the peak of the matrix units, divided by the
               bundles; a product of 512×128 by 128×512 needs 512 cycles
fills, spills  loads and stores of vector registers that did not suffice
"""

from __future__ import annotations

import argparse
import glob
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
HEADS, WIDTH, CHUNK = 8, 128, 512
# Bundles that a product of 512×128 by 128×512 takes at the peak of four units of 128×128 multipliers.
PRODUCT = {"v5e": 512, "v5p": 512}
COLUMNS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "fills", "VSTORE", "spills", "SALU")


def programs(length: int):
    """Name -> (the kernel's name in the dump, products in a step, products in a chunk, a function of q, k, v, beta).

    Products are of 512×128 by 128×512; of a causal tile half counts. q, k, v are [1, T, H, K].
    """
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    from deltaformer_jax import delta_attention, delta_values, gated_delta_rule

    def attention(q, k, v, beta):
        mask = masks.MultiHeadMask([masks.FullMask((length, length))] * HEADS)
        sizes = splash.BlockSizes(block_q=512, block_kv=512, block_kv_compute=512)
        kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes)
        first = lambda x: jnp.swapaxes(x[0], 0, 1)
        return kernel(first(q), first(k), first(v))

    call = lambda **more: lambda q, k, v, beta: delta_attention(q, k, v, beta=beta, implementation="pallas_tpu", **more)
    gradient = lambda f: (
        lambda q, k, v, beta: jax.grad(lambda *x: f(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2, 3))(q, k, v, beta)
    )

    def gated(q, k, v, beta):
        return gated_delta_rule(q, k, v, beta=beta, log_decay=-beta, implementation="pallas_tpu")[0]

    # A chunk of 128 rows of the gated delta rule has eight products of 128×128×128 (K Kᵀ, Q Kᵀ, T K, T V, W S, Q S,
    # P V', Kᵀ V'). Four chunks have as much as 2 products of 512×128×512. The backward pass recomputes them and makes
    # two gradients of each.
    return {
        "splash attention": ("splash", 2, 0, attention),
        "write alone": (
            "delta_forward",
            2,
            1,
            lambda q, k, v, beta: delta_values(k, v, beta=beta, implementation="pallas_tpu"),
        ),
        "write and read, w = k": ("delta_forward", 4, 2, call()),
        "write and read, one pass (w = q)": ("delta_forward", 2, 1, call(write_query="query")),
        "backward, w = k": ("delta_backward", 10, 5, gradient(call())),
        "backward, one pass (w = q)": ("delta_backward", 5, 2.5, gradient(call(write_query="query"))),
        "gated_delta_rule, a head's decay": ("gated_forward", 0, 2, gated),
        "gated_delta_rule, backward": ("gated_backward", 0, 6, gradient(gated)),
    }


def compile_one(name: str, tpu: str, length: int) -> None:
    """Compile one program, in its own process, since libtpu reads only once where to write its dump."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

    one = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[tpu]).devices[0]
    place = SingleDeviceSharding(one)
    x = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.bfloat16, sharding=place)
    beta = jax.ShapeDtypeStruct((1, length, HEADS), jnp.float32, sharding=place)
    kind = AbstractDevice(device_kind=one.device_kind, num_cores=1, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)):
        jax.jit(programs(length)[name][-1]).trace(x, x, x, beta).lower().compile()


def bundles(folder: str, kernel: str) -> dict[int, dict[str, int]]:
    """Loop depth -> number of bundles at that depth, and the slots that each unit uses in them."""
    newest = lambda ending: sorted(glob.glob(f"{folder}/*{kernel}*{ending}"))[-1]
    used = [
        [int(x) for x in line.split()]
        for line in Path(newest("final_hlo-static-per-bundle-utilization.txt")).read_text().splitlines()
        if re.fullmatch(r"\d+( \d+)+\s*", line)
    ]
    counts: dict[int, dict[str, int]] = {}
    for line in Path(newest("-final_bundles.txt")).read_text().splitlines():
        found = re.match(r"\s*(0x[0-9a-f]+|0)\s*(?:[A-Z]+:?)?\s*:?\s*([> ]*)\{", line)
        if found:
            at = counts.setdefault(found[2].count(">"), dict.fromkeys(("bundles", *COLUMNS), 0))
            at["bundles"] += 1
            for unit, slots in zip(COLUMNS, used[int(found[1], 16)]):
                at[unit] += slots
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tpu", choices=TPUS, default="v5e")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--json", help="also write the table here")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.compile:
        compile_one(flags.compile, flags.tpu, flags.length)
        return
    from measure import report
    from rich.console import Console

    rows, console = [], Console(stderr=True)
    for name, (kernel, in_step, in_chunk, _) in programs(flags.length).items():
        with tempfile.TemporaryDirectory() as folder, console.status(f"compiling {name}"):
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "TPU_SKIP_MDS_QUERY": "1",
                "TPU_WORKER_HOSTNAMES": "localhost",
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
            }
            again = [sys.executable, __file__, "--compile", name, "--tpu", flags.tpu, "--length", str(flags.length)]
            done = subprocess.run(again, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-2000:]}")
            counts = bundles(folder, kernel)
        rows += parts(name, counts, in_step, in_chunk, flags.length // CHUNK, PRODUCT.get(flags.tpu))
    report(
        f"Static schedule, {flags.tpu}, T = {flags.length}, {HEADS} heads of {WIDTH}, bfloat16",
        rows,
        flags.json,
        tpu=flags.tpu,
        length=flags.length,
        libtpu=importlib.metadata.version("libtpu"),
    )


def parts(name, counts, in_step, in_chunk, chunks, product):
    """The rows of one kernel: step, chunk, all. `product`: bundles that a product needs at the peak, or None."""
    steps = chunks * (chunks - 1) // 2
    # Part -> (tokens, bundles, products, slots). The loops over earlier tiles are inside the loop over chunks. Splash
    # attention has only a loop over steps.
    found = {}
    if in_step:
        slots = counts[2 if in_chunk else 1]
        found["step"] = (CHUNK, slots["bundles"], in_step, slots)
    if in_chunk:
        found["chunk"] = (CHUNK, counts[1]["bundles"], in_chunk, counts[1])
        _, step, _, _ = found.get("step", (0, 0, 0, {}))
        total = chunks * counts[1]["bundles"] + steps * step
        found["all"] = (chunks * CHUNK, total, chunks * in_chunk + steps * in_step, {})
    return [
        {"kernel": name, "part": part, "bundles": length, "a token": length / tokens}
        | ({"of peak": useful * product / length} if product else {})
        | {unit: slots[unit] for unit in ("MXU", "XLU", "VALU", "EUP", "fills", "spills") if slots}
        for part, (tokens, length, useful, slots) in found.items()
    ]


if __name__ == "__main__":
    main()
