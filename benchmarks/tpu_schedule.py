"""How well a TPU's matrix units are filled, by the compiler's own schedule; no TPU is needed.

    JAX_PLATFORMS=cpu uv run --group kernels python benchmarks/tpu_schedule.py [--tpu v5e] [--length 8192] [--json FILE]

Two minutes. Compiles delta_attention's kernels (8 heads of 128, bfloat16) and JAX's splash attention without a mask for
the same TPU, and counts instruction bundles, one a cycle where nothing stalls, and the slots that each unit takes of
them. "a chunk" is what 512 rows take once: the diagonal, the triangular system, loads and stores; "inner loops" what
they take for earlier columns: one step of each loop there is: forward a write's and a read's, 1024 columns and 512, and
512 rows backward. The gated ops' kernels have no inner loops: "a chunk" is a group of four chunks of 128 there. Splash
attention's only part is one step of 512×512, masks and sums included. Spills and fills are
stores and loads of registers that did not suffice.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
HEADS, WIDTH = 8, 128
COLUMNS = ("MXU", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "fills", "VSTORE", "spills", "SALU")


def programs(length: int):
    """Name -> (the kernel's name in the dump, a function of q, k, v, beta [1,T,H,K])."""
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

    call = lambda **more: lambda q, k, v, beta: delta_attention(
        q, k, v, beta=beta, implementation="pallas_tpu", **more
    )
    gradient = lambda f: lambda q, k, v, beta: jax.grad(
        lambda *x: f(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2, 3)
    )(q, k, v, beta)
    def gated(q, k, v, beta):
        return gated_delta_rule(q, k, v, beta=beta, log_decay=-beta, implementation="pallas_tpu")[0]

    return {
        "splash attention": ("splash", attention),
        "write alone": (
            "delta_forward",
            lambda q, k, v, beta: delta_values(k, v, beta=beta, implementation="pallas_tpu"),
        ),
        "write and read, w = k": ("delta_forward", call()),
        "one pass, w = q": ("delta_forward", call(write_query="query")),
        "backward, w = k": ("delta_backward", gradient(call())),
        "backward, w = q": ("delta_backward", gradient(call(write_query="query"))),
        "gated_delta_rule, a head's decay": ("gated_forward", gated),
        "gated_delta_rule, backward": ("gated_backward", gradient(gated)),
    }


def compile_one(name: str, tpu: str, length: int) -> None:
    """In a process of its own, since libtpu reads where to dump to once."""
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
        jax.jit(programs(length)[name][1]).trace(x, x, x, beta).lower().compile()


def bundles(folder: str, kernel: str) -> dict[int, dict[str, int]]:
    """Depth of the loop -> bundles there, and slots used of each unit in them."""
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

    rows = []
    for name, (kernel, _) in programs(flags.length).items():
        with tempfile.TemporaryDirectory() as folder:
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
            for depth, counts in sorted(bundles(folder, kernel).items()):
                if depth:
                    where = "a chunk" if depth == 1 else "inner loops"
                    keep = ("bundles", "MXU", "XLU", "VALU", "EUP", "fills", "spills")
                    rows.append({"kernel": name, "part": where} | {unit: counts[unit] for unit in keep})
    for row in rows:
        row["MXU slots a bundle, of 4"] = row["MXU"] / row["bundles"]
    report(f"Static schedule, {flags.tpu}, T = {flags.length}, {HEADS} heads of {WIDTH}, bfloat16", rows, flags.json)


if __name__ == "__main__":
    main()
