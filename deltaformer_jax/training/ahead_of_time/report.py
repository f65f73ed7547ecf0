"""A plan, printed for a reader or written as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
from typing import Any

import jax
from etils import epath

from deltaformer_jax.config import Config
from deltaformer_jax.host.paths import expand
from deltaformer_jax.training.ahead_of_time.plan import Plan, make_plan
from deltaformer_jax.training.ahead_of_time.topologies import find_topology
from deltaformer_jax.training.dry_run import print_memory, print_sizes
from deltaformer_jax.training.memory import size_text


def report(config: Config, topology: str, json: str | None = None) -> int:
    """Compile the step of `config` for the devices that `topology` names; print the plan, and write it to `json`.

    Returns 0, or 1 if the step does not fit.
    """
    # The program is compiled for other devices: those of this machine, if it has any, stay free.
    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")
    found = find_topology(topology)
    # jax cannot read such a program back from its cache, and would warn of it each time.
    jax.config.update("jax_enable_compilation_cache", False)
    plan = make_plan(config, found)
    print_plan(plan)
    if json is not None:
        write_plan(plan, json)
    return 0 if plan.fits else 1


def print_plan(plan: Plan) -> None:
    print(f"devices     {plan.topology.title}")
    print_sizes(plan.config, plan.program)
    print(f"recomputed  model.remat = {plan.config.model.remat}")
    if plan.compiled is not None:
        print_memory(plan.program, plan.compiled)
    share = plan.needed / plan.available
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    print(f"{verdict}: {size_text(plan.needed)} of {size_text(plan.available)} on a device, {share:.0%}")
    if not plan.fits:
        print("the largest arrays when most is held:")
        for buffer in plan.largest:
            print(f"  {size_text(buffer.bytes):>10}  {buffer.shape:28}  {buffer.origin}")
    print("sent by a device in a step:")
    for row in plan.sent or []:
        print(f"  {'+'.join(row.axes):14}  {row.kind:18}  {size_text(row.bytes):>10}  {1e3 * row.seconds:8.3g} ms")
    if not plan.sent:
        print("  nothing")
    roofline, flops = plan.roofline, plan.flops
    again = flops.recomputed(plan.config.model.remat) / (3 * flops.model)
    print(f"arithmetic  {plan.model_tflop:,.4g} TFLOP a step on all devices, and {again:.0%} of that computed again")
    print(
        f"at least    arithmetic {_ms(roofline.arithmetic)}, memory {_ms(roofline.memory)}, communication "
        f"{_ms(roofline.communication)}"
    )
    print(
        f"a step      {_ms(roofline.overlapped)} if these overlap, bound by {roofline.bound}: MFU "
        f"{plan.utilisation(roofline.overlapped):.0%}; {_ms(roofline.in_turn)} in turn: "
        f"{plan.utilisation(roofline.in_turn):.0%}. By the data sheets' peaks; nothing was run"
    )
    print(f"compiled by {', '.join(f'{name} {version}' for name, version in versions().items())}")


def write_plan(plan: Plan, path: str) -> None:
    epath.Path(expand(path)).write_text(json.dumps(as_dict(plan), indent=1) + "\n")


def as_dict(plan: Plan) -> dict[str, Any]:
    roofline = plan.roofline
    return {
        "topology": plan.topology.name,
        "slices": plan.topology.slices,
        "chips": plan.topology.chips,
        "devices": len(plan.topology.devices),
        "mesh": dict(plan.program.mesh.shape),
        "remat": plan.config.model.remat,
        "tokens": plan.tokens,
        "fits": plan.fits,
        "bytes_needed": plan.needed,
        "bytes_available": plan.available,
        "largest": [buffer._asdict() for buffer in plan.largest],
        "sent": [row._asdict() for row in plan.sent],
        "model_tflop": plan.model_tflop,
        "seconds": roofline._asdict() | {"overlapped": roofline.overlapped, "in_turn": roofline.in_turn},
        "bound": roofline.bound,
        "mfu": {
            "overlapped": plan.utilisation(roofline.overlapped),
            "in_turn": plan.utilisation(roofline.in_turn),
        },
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of jax and of the compilers that are installed."""
    found = {"jax": jax.__version__}
    for name in ("jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.4g} ms"
