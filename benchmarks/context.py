"""Context parallelism: what the devices send each other, beside the formula, and how long they wait.

    uv run python benchmarks/context.py [--devices 8] [--tokens 65536] [--heads 32] [--kv_heads 4] [--head_dim 128]
                                        [--block 512] [--json FILE]

Takes a few minutes on two cores: it compiles each form, forward and with gradients, for simulated CPU devices in
float32, and runs nothing. The ops are those of one row of --tokens tokens.

sent     MB that a device sends, by the collectives in the compiled program (`deltaformer_jax/compiled/collectives.py`)
formula  MB by the formula in the form's docstring, forward; both leave out the segment ids
idle     the share of the devices' time in which they wait for the busiest one of a step
         (`sharding/context/schedule.py`): no measurement, and nothing of the time that sending takes

Beside DeltaFormer's chain it prints (2P − 1)/(n + 2P − 1), the idle share of a chain with two zig-zag blocks a device
and one of the n rows × write heads after the other.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

from measure import report

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in dict(devices=8, tokens=65_536, heads=32, kv_heads=4, head_dim=128, block=512).items():
    parser.add_argument(f"--{name}", type=int, default=default)
parser.add_argument("--json")


class Form(NamedTuple):
    """A form for a device's part, the sizes [heads, ...] of its arrays, and the numbers that a device sends forward."""

    function: Callable
    sizes: dict[str, tuple[int, ...]]
    numbers: float
    idle: str


def forms(options) -> dict[str, Form]:
    import numpy as np

    from deltaformer_jax import delta_attention
    from deltaformer_jax.sharding.context.chain import delta_attention_pipeline
    from deltaformer_jax.sharding.context.heads import heads_divide, over_heads
    from deltaformer_jax.sharding.context.ring import causal_attention_ring
    from deltaformer_jax.sharding.context.schedule import choose_groups, idle_share, ring_work, work
    from deltaformer_jax.sharding.context.states import gated_delta_rule_states, gated_linear_attention_states

    P, H, G, K = options.devices, options.heads, options.kv_heads, options.head_dim
    tokens = options.tokens // P
    away = (P - 1) / P
    attention = dict(query=(H, K), key=(G, K), value=(G, K))
    delta = attention | dict(beta=(G,))
    # Every array goes once over the devices, and the output back.
    spread = tokens * away * (2 * H * K + 2 * G * K + G)
    blocks = options.tokens // options.block
    groups, reads = choose_groups(G, blocks, P, H / G), H / G
    chain = work(blocks, P, groups, reads)
    lockstep = (2 * P - 1) / (G + 2 * P - 1)
    # Each step, each device sends one block of a group to all others.
    exchanged = chain.shape[0] * (P - 1) * options.block * 2 * K * G / groups
    zigzag = np.stack([[p, 2 * P - 1 - p] for p in range(P)])
    ring = (P - 1) * tokens * 2 * G * K
    memory = dict(query=(H, K), key=(H, K), value=(H, K))
    decay = dict(log_decay=(H,))
    rule = lambda **arrays: gated_delta_rule_states("context", **arrays)[0]
    linear = lambda **arrays: gated_linear_attention_states("context", **arrays)[0]
    found = {
        "DeltaFormer, chain": Form(
            functools.partial(delta_attention_pipeline, "context", chunk_size=options.block),
            delta,
            spread + exchanged,
            f"{idle_share(chain):.1%} ({groups} groups; zig-zag, head by head: {lockstep:.0%})",
        ),
        "softmax, ring": Form(
            functools.partial(causal_attention_ring, "context"),
            attention,
            # Half of a device's tokens stay in the zig-zag order on two of the devices: the first and the last half.
            tokens * (2 * H * K + 2 * G * K) + ring,
            f"{idle_share(ring_work(zigzag)):.1%} (contiguous: {idle_share(ring_work(np.arange(P)[:, None])):.0%})",
        ),
        "gated delta rule, states": Form(rule, memory | decay | dict(beta=(H,)), (P - 1) * H * 2 * K * K, "0"),
        "gated linear attention, states": Form(linear, memory | decay, (P - 1) * H * (1 + K * K), "0"),
    }
    sizes = delta if heads_divide({name: np.zeros((1, 1, *size)) for name, size in delta.items()}, P) else None
    if sizes is not None:
        alone = functools.partial(delta_attention, implementation="chunked")
        op = lambda **arrays: over_heads(alone, arrays, "context")
        found["DeltaFormer, all-to-all over heads"] = Form(op, delta, spread, "0")
    return found


def row(name: str, form: Form, options) -> dict:
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, PartitionSpec

    from deltaformer_jax.compiled.collectives import bytes_by_kind, collectives

    mesh = jax.make_mesh((options.devices,), ("context",), axis_types=(AxisType.Auto,))
    part = PartitionSpec(None, "context")
    arrays = {name: jax.ShapeDtypeStruct((1, options.tokens, *size), jnp.float32) for name, size in form.sizes.items()}
    spread = jax.shard_map(
        lambda arrays: form.function(**arrays), mesh=mesh, in_specs=(part,), out_specs=part, check_vma=False
    )
    gradients = jax.grad(lambda arrays: jnp.sum(spread(arrays) ** 2))

    def sent(function):
        text = jax.jit(function).lower(arrays).compile().as_text()
        kinds = bytes_by_kind(collectives(text, options.devices))
        return {kind: size / 1e6 for kind, size in kinds.items() if size}

    forward, whole = sent(spread), sent(gradients)
    formula = form.numbers * 4 / 1e6
    total = sum(forward.values())
    show = lambda kinds: ", ".join(f"{kind} {size:.1f}" for kind, size in kinds.items())
    return {
        "form": name,
        "sent forward": show(forward),
        "sum": f"{total:.1f}",
        "formula": f"{formula:.1f}",
        "sum / formula": f"{total / formula:.3f}",
        "sent with gradients": show(whole),
        "idle": form.idle,
    }


def main():
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(options.devices))
    rows = [row(name, form, options) for name, form in forms(options).items()]
    report("Context parallelism: MB that each device sends", rows, options.json)


if __name__ == "__main__":
    main()
