"""Statistics, TensorBoard, profiles and the compilation cache: what they say is true, and the run is the same run."""

import builtins
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import training_cases as cases

from deltaformer_jax.config import Mixer
from deltaformer_jax.data import batches, load_data
from deltaformer_jax.model_parts import merge
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.setup import prepare
from deltaformer_jax.training.watch.statistics import activations, as_record
from deltaformer_jax.training.watch.tensorboard import TensorBoard


def total_norm(norms: dict[str, float]) -> float:
    """The 2-norm of all arrays together, from each one's."""
    return math.sqrt(sum(norm * norm for norm in norms.values()))


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return folder, cases.run_training(cases.small_config(corpus), folder)


def passed_elsewhere(request) -> bool:
    """Whether the test has passed in a process of its own, since this one cannot make a profile.

    Where there is no TPU, jax's profiler crashes a process that has loaded libtpu, as tests of ahead-of-time compiling
    do.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists() or "libtpu" not in maps.read_text():
        return False
    test = f"{request.path}::{request.node.name}"
    done = subprocess.run([sys.executable, "-m", "pytest", "-n", "0", "-m", "", test], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return True


@pytest.mark.parametrize(
    ("accumulation", "mesh"),
    [pytest.param(1, {}, marks=pytest.mark.long), (2, {"data": 2, "fsdp": 2, "tensor": 1})],
)
def test_statistics_are_those_of_the_step(corpus, accumulation, mesh):
    mixers = ("delta_former", Mixer("softmax_attention", window=8))
    config = cases.small_config(
        corpus,
        model__mixers=mixers,
        model__num_layers=4,
        model__vocab_size=257,
        optimizer__accumulation_steps=accumulation,
        **{f"mesh__{axis}": size for axis, size in mesh.items()},
    )
    devices = jax.devices()[: 4 if mesh else 1]
    program = Program(config, make_mesh(config.mesh, devices))
    state = program.create_state(config.run.seed)
    batch = next(batches(load_data(corpus), "train", sequence_length=32, batch_size=8, seed=0))
    batch["segment_ids"][0, 20:] = 0  # some padding
    record = as_record(jax.device_get(program.statistics_step(state.params, batch)))
    json.dumps(record)

    params = jax.device_get(state.params)
    kernels = params["blocks"][1]["mlp"]["down"]  # [periods, mlp, embed]: layers 1 and 3
    assert record["parameter_norm"]["layers.3.mlp.down"] == pytest.approx(np.linalg.norm(kernels[1]), rel=1e-5)
    table = params["embedding"]["table"]
    assert record["parameter_norm"]["embedding.table"] == pytest.approx(np.linalg.norm(table), rel=1e-5)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert len(record["gradient_norm"]) == sum(2 if path[0].key == "blocks" else 1 for path in paths)

    rms = record["activation_rms"]
    assert list(rms) == ["embedding", "layers.0", "layers.1", "layers.2", "layers.3"] == list(record["activation_max"])
    part = {name: value[::accumulation] for name, value in batch.items()}
    model = merge(program.parts, jax.tree.map(jnp.asarray, params))
    embedded = np.asarray(model.embedding(part["tokens"], part["segment_ids"]))[part["segment_ids"] > 0]
    assert rms["embedding"] == pytest.approx(np.sqrt((embedded**2).mean()), rel=1e-5)
    assert record["activation_max"]["embedding"] == pytest.approx(np.abs(embedded).max(), rel=1e-5)

    _, metrics = program.train_step(state, batch)
    assert total_norm(record["gradient_norm"]) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)


def test_the_activations_are_the_models(corpus):
    """Of a pattern of two mixers, with padding: the model's own forward pass, and a size for each of its layers."""
    config = cases.small_config(corpus, model__vocab_size=257, model__mixers=("delta_former", "softmax_attention"))
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    model = merge(program.parts, program.create_state(config.run.seed).params)
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 257)
    segment_ids = jnp.array([[1] * 9 + [2] * 5 + [0] * 2, [0] * 4 + [1] * 12])
    seen, sizes = activations(model, tokens, segment_ids)
    hidden, _ = model.hidden(tokens, segment_ids=segment_ids)
    np.testing.assert_allclose(seen, hidden, rtol=1e-5, atol=1e-5)
    last = np.asarray(model.look(tokens, lambda before, after, real: after, segment_ids=segment_ids)[1][-1])
    np.testing.assert_allclose(model.final_norm(jnp.asarray(last)), hidden, rtol=1e-5, atol=1e-5)
    rms, most = (np.asarray(values) for values in sizes["layers"])
    last = last[np.asarray(segment_ids) > 0]
    assert rms[-1] == pytest.approx(np.sqrt((last**2).mean()), rel=1e-5) and most[-1] == np.abs(last).max()


@pytest.mark.long
def test_a_run_with_instruments_is_the_same_run(corpus, plain, tmp_path, request):
    if passed_elsewhere(request):
        return
    from tensorboardX.proto import event_pb2

    options = {"run__tensorboard": True, "run__statistics_every": 5, "run__profile_steps": 2}
    config = cases.small_config(corpus, **options)
    cases.run_training(config, tmp_path, lambda steps: cases.StopAt(steps, 7))
    run = cases.run_training(config, tmp_path)
    folder, before = plain
    cases.assert_same_bits(run.state, before.state)
    assert cases.read_metrics(tmp_path) == cases.read_metrics(folder)

    statistics = [json.loads(line) for line in (tmp_path / "statistics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in statistics] == [1, 5, 10]
    norms = {record["step"]: record["grad_norm"] for record in cases.read_metrics(tmp_path) if "grad_norm" in record}
    for record in statistics:
        assert total_norm(record["gradient_norm"]) == pytest.approx(norms[record["step"]], rel=1e-4)

    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 2 and all(path.stat().st_size > 1000 for path in traces)  # of each process one

    seen = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        for event in _events(path.read_bytes(), event_pb2.Event):
            for value in event.summary.value:
                seen.setdefault(value.tag, {})[event.step] = value.simple_value
    losses = {record["step"]: record["loss"] for record in cases.read_metrics(folder) if "loss" in record}
    assert seen["training/loss"] == pytest.approx(losses, rel=1e-6)
    assert set(seen["evaluation/bits_per_byte"]) == {5, 10, 12} and set(seen["activation_rms/layers.1"]) == {1, 5, 10}


def _events(content, kind):
    """Records of a TensorBoard file: length (8 bytes), checksum (4), content, checksum (4)."""
    place = 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 8], "little")
        yield kind.FromString(content[place + 12 : place + 12 + size])
        place += 16 + size


def test_by_default_there_is_nothing_of_it(plain):
    folder, _ = plain
    assert {path.name for path in folder.iterdir()} == cases.FILES


def test_a_profile_longer_than_the_run_ends_with_it(corpus, tmp_path, request):
    if passed_elsewhere(request):
        return
    cases.run_training(cases.small_config(corpus, run__profile_steps=100), tmp_path)
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_tensorboard_that_is_not_installed_is_named_before_any_work(corpus, tmp_path, monkeypatch):
    really = builtins.__import__

    def without(name, *arguments, **options):
        if name == "tensorboardX":
            raise ImportError(name)
        return really(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"run.tensorboard = True: needs tensorboardX.* not installed: .*tensorboard"):
        prepare(cases.small_config(corpus, run__tensorboard=True), tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()


def test_tensorboard_passes_by_what_is_no_number(tmp_path):
    board = TensorBoard(tmp_path, 0)
    board.write({"step": 1, "loss": 1.0, "note": "x", "flag": True, "none": None})
    board.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_the_compilation_cache(corpus, tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    (tmp_path / "file").write_text("")
    try:
        config = cases.small_config(corpus, run__compilation_cache=str(tmp_path / "file" / "cache"), run__steps=2)
        with pytest.raises(OSError, match=r"run.compilation_cache = '.*cache': cannot be made"):
            prepare(config, tmp_path / "run", devices=jax.devices()[:1])
        config.run.compilation_cache = str(tmp_path / "cache")
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()
        jax.clear_caches()
        cases.run_training(config, tmp_path / "run")
        kept = {path.name for path in (tmp_path / "cache").iterdir()}
        assert any("jit_step" in name for name in kept) and any("jit_create" in name for name in kept)
        jax.clear_caches()  # as a new process has it
        cases.run_training(config, tmp_path / "again")
        assert {path.name for path in (tmp_path / "cache").iterdir()} == kept
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        from jax.experimental.compilation_cache import compilation_cache

        compilation_cache.reset_cache()
