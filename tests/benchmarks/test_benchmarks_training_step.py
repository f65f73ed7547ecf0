"""benchmarks/train.py: parts of a step, its FLOPs, a profile, and input that is refused."""

import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.profiler import ProfileData
from training_step import counted
from training_step.compiled import compile_step, random_batch
from training_step.parts import PARTS, kernel_passes, measured, part_of, roofline
from training_step.profile import device_events

from deltaformer_jax.compiled.launches import Launch, launches
from deltaformer_jax.config import DataConfig, ModelConfig
from deltaformer_jax.config.files import packaged_config
from deltaformer_jax.model_parts import model_parts
from deltaformer_jax.training.ahead_of_time.flops import model_flops

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "train.py"


def launch(name, op_name, turns=1, bytes=0, flops=0, kernel=False):
    return Launch(name, "custom-call" if kernel else "fusion", op_name, "f32[]", turns, bytes, flops, kernel, "")


FORWARD, BACKWARD = "jit(step)/jvp(jit(_hidden))", "jit(step)/transpose(jvp(jit(_hidden)))"
LAYER = "/while/body/closed_call"
NAMES = {
    f"{FORWARD}{LAYER}/jit(_attend)/cond/branch_0_fun/triton_kernel_call": "mixers",
    f"{BACKWARD}{LAYER}/checkpoint/rematted_computation/jit(_run)/jit(_where)/select_n": "mixers",
    f"{BACKWARD}{LAYER}/checkpoint/mul": "elementwise",
    f"{BACKWARD}/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice": "rest",
    f"{FORWARD}/while/body/dynamic_slice": "rest",
    f"{BACKWARD}/scatter-add": "rest",
    "jit(step)/jvp()/while/body/closed_call/nd,vd->nv/dot_general": "logits",
    "jit(step)/transpose(jvp())/while/body/closed_call/add_any": "logits",
    f"jit(step)/while/body/closed_call{BACKWARD.removeprefix('jit(step)')}{LAYER}/mul": "elementwise",
    f"jit(step)/while/body/closed_call{FORWARD.removeprefix('jit(step)')}/mul": "rest",
    "jit(step)/while/body/closed_call/add": "rest",
    "jit(step)/jit(_where)/select_n": "optimiser",
    "": "rest",
}


@pytest.mark.parametrize("op_name", NAMES)
def test_part_of_a_launch(op_name):
    assert part_of(launch("fusion", op_name)) == NAMES[op_name]


def test_products_and_kernels_are_known_by_what_they_do():
    name = f"{FORWARD}{LAYER}/own_mixer/call"
    assert part_of(launch("gemm", name, flops=8)) == "products"
    assert part_of(launch("kernel", name, kernel=True)) == "mixers"


def test_roofline_is_bytes_or_arithmetic_launch_by_launch():
    forward = f"{FORWARD}{LAYER}/jit(_attend)/triton_kernel_call"
    again = f"{BACKWARD}{LAYER}/checkpoint/rematted_computation/jit(_attend)/triton_kernel_call"
    back = f"{BACKWARD}{LAYER}/checkpoint/jit(_attend)/triton_kernel_call"
    found = [
        launch("a", f"{FORWARD}{LAYER}/dot_general", turns=2, bytes=10, flops=1000),  # 10 s of arithmetic, 1 of bytes
        launch("b", f"{FORWARD}{LAYER}/dot_general", bytes=100, flops=10),  # 10 s of bytes
        launch("k", forward, turns=2, bytes=20, kernel=True),
        launch("r", again, turns=2, bytes=10, kernel=True),
        launch("g", back, turns=2, bytes=20, kernel=True),
    ]
    assert kernel_passes(found) == 3.5
    rows = {row.part: row for row in roofline(found, kernel_flops=700.0, bandwidth=10.0, peak=100.0)}
    assert tuple(rows) == PARTS
    assert rows["products"] == ("products", 3, 120, 2010, 30.0)
    assert rows["mixers"] == ("mixers", 6, 100, 700.0, 10.0)
    assert kernel_passes(found[:2]) == 0.0


def small(remat):
    config = packaged_config("tiny")
    return dataclasses.replace(
        config,
        model=ModelConfig(
            vocab_size=128,
            d_model=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            head_dim=16,
            mlp_dim=64,
            mixers=("softmax_attention",),
            implementation="parallel",
            remat=remat,
        ),
        data=DataConfig(path="", sequence_length=16, batch_size=4),
    )


def test_products_of_a_compiled_step_are_those_of_the_closed_form():
    """Forward, backward twice that, and with remat="block" the layers' products again."""
    step = compile_step(small("block"), jax.devices()[0])
    found, _ = launches(step.compiled.as_text())
    flops = dict.fromkeys(PARTS, 0)
    for x in found:
        flops[part_of(x)] += x.turns * x.flops
    asked, ops, _ = model_flops(step.program.parts, 16)
    products = asked - ops - 2 * 32 * 128
    # The product that ends a layer is not needed again: the feed-forward layer's last.
    assert flops["products"] == 64 * (4 * products - 2 * 2 * 64 * 32)
    assert flops["logits"] == 64 * 3 * 2 * 32 * 128
    assert flops["mixers"] and not flops["elementwise"] and not flops["optimiser"] and not flops["rest"]
    assert {part_of(x) for x in found} == set(PARTS)
    _, metrics = step.compiled(step.program.create_state(0), random_batch(step))
    assert 0 < float(metrics["loss"]) < 10


@pytest.mark.parametrize(
    "mixer, settings, ops",
    [
        ("delta_former", {}, 2 * (2 + 2) * 16 * 100),  # a write and a read, two products each, of half of T x T
        ("softmax_attention", {}, 4 * 2 * 16 * 50),
        ("gated_delta_net", {"conv_size": 4}, 6 * 2 * 16 * 16),
    ],
)
def test_flops_of_the_mixers_ops(mixer, settings, ops):
    model = dataclasses.replace(small("none").model, mixers=(mixer,), implementation=None, **settings)
    assert model_flops(model_parts(model), 100).ops == pytest.approx(model.num_layers * ops)


def test_a_profile_is_matched_by_the_instructions_names(tmp_path):
    event = lambda name, duration, stat="": f"events {{ metadata_id: {name} duration_ps: {duration}000000000 {stat} }}"
    text = f"""
    planes {{
      name: "/device:GPU:0 H100"
      lines {{ name: "Stream #13(Compute)" {event(1, 5, 'stats { metadata_id: 1 str_value: "triton_kernel_call.2" }')}
               {event(2, 3)} {event(3, 1)} }}
      lines {{ name: "XLA Ops" {event(2, 100)} }}
      event_metadata {{ key: 1 value {{ id: 1 name: "write_forward" }} }}
      event_metadata {{ key: 2 value {{ id: 2 name: "gemm_fusion_dot_4" }} }}
      event_metadata {{ key: 3 value {{ id: 3 name: "MemcpyD2D" }} }}
      stat_metadata {{ key: 1 value {{ id: 1 name: "hlo_op" }} }}
    }}
    planes {{ name: "/host:CPU" lines {{ name: "Stream" {event(1, 100)} }}
              event_metadata {{ key: 1 value {{ id: 1 name: "host" }} }} }}
    """
    with pytest.raises(FileNotFoundError, match="no profile"):
        list(device_events(str(tmp_path)))
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "a.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    found = [
        launch("triton_kernel_call.2", f"{FORWARD}{LAYER}/jit(_attend)/triton_kernel_call", kernel=True),
        launch("gemm_fusion_dot.4", f"{FORWARD}{LAYER}/dot_general", flops=2),
    ]
    parts = measured(device_events(str(tmp_path)), found)
    assert {name: time for name, time in parts.items() if time} == pytest.approx(
        {"mixers": 5e-3, "products": 3e-3, "not matched": 1e-3}
    )


def refused(*arguments):
    done = subprocess.run([sys.executable, BENCHMARK, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done
    return done.stderr


def test_bad_input_is_one_line():
    assert "did you mean deltaformer_340m?" in refused("--config", "deltaformer_340")
    assert "model.remat = 'blok'" in refused("--remat", "blok")


def test_packages_that_are_missing_are_named_with_the_command(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmarks_train", BENCHMARK)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps jax-cuda12-plugin==\d.* 'triton"):
        program.check_compiler()


def test_a_step_that_does_not_fit_is_refused(monkeypatch):
    step = SimpleNamespace(title="64 x 2048 tokens", memory=90_000_000_000)
    topology = SimpleNamespace(devices=[None], device_memory=8e10)
    monkeypatch.setattr(counted, "find_topology", lambda _: topology)
    monkeypatch.setattr(counted, "compile_step", lambda *_: step)
    with pytest.raises(ValueError, match=r"64 x 2048 tokens: the step takes 90.0 GB, .* 84.9; give a smaller --batch"):
        counted.prepare(None)
