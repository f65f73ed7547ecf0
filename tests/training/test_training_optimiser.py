"""The schedules' values, what weight decay and clipping touch, and each update by name: values, runs, shardings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from support import training_cases as cases

from deltaformer_jax.config import MeshConfig, ModelConfig, OptimizerConfig
from deltaformer_jax.config.checks import check
from deltaformer_jax.model_parts import model_parts
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.dry_run import dry_run
from deltaformer_jax.training.optimiser import learning_rate_schedule, make_optimiser, muon_matrices, muon_matrix
from deltaformer_jax.training.program import Program

NAMES = ("adamw", "muon", "lion", "adafactor")
RATES = {"adamw": 3e-3, "muon": 3e-3, "lion": 1e-3, "adafactor": 3e-2}


def values(config, steps):
    schedule = learning_rate_schedule(config)
    return np.array([float(schedule(jnp.int32(n))) for n in steps])


def expected(config, n):
    """The docstring of learning_rate_schedule, in plain Python."""
    peak, warmup, length = config.learning_rate, config.warmup_steps, config.decay_steps
    floor = peak * config.final_learning_rate
    if n < warmup:
        return peak * (n + 1) / warmup
    if config.schedule == "constant":
        return peak
    if config.schedule == "cosine":
        part = min((n - warmup) / (length - warmup), 1)
        return floor + (peak - floor) * (1 + np.cos(np.pi * part)) / 2
    down = round(config.wsd_decay_fraction * length)
    return peak - (peak - floor) * min(max(n - (length - down), 0) / down, 1)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_schedule(schedule, warmup):
    config = OptimizerConfig(
        learning_rate=0.5, warmup_steps=warmup, decay_steps=50, schedule=schedule, wsd_decay_fraction=0.3
    )
    steps = [0, 1, 5, 9, 10, 11, 34, 35, 36, 49, 50, 51, 500]
    np.testing.assert_allclose(values(config, steps), [expected(config, n) for n in steps], rtol=1e-5)


def test_wsd_that_decays_all_the_way():
    config = OptimizerConfig(
        learning_rate=1.0,
        warmup_steps=10,
        decay_steps=20,
        schedule="wsd",
        wsd_decay_fraction=1.0,
        final_learning_rate=0.0,
    )
    np.testing.assert_allclose(values(config, [9, 10, 15, 20]), [1.0, 1.0, 0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_decayed_is_matrices(name):
    parts = model_parts(ModelConfig(vocab_size=32, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16))
    decayed = {}
    for path, decay in jax.tree_util.tree_leaves_with_path(parts.decay):
        decayed[jax.tree_util.keystr(path, simple=True, separator=".")] = decay
    assert {name for name, decay in decayed.items() if not decay} == {
        name for name in decayed if name.endswith(("scale", "bias"))
    }
    assert decayed["embedding.table"] and decayed["blocks.0.mixer.output"] and not decayed["final_norm.scale"]

    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), parts.params)
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, weight_decay=0.5)
    optimiser = make_optimiser(config, parts.decay, parts.axes)
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params)
    for update, decay in zip(jax.tree.leaves(updates), jax.tree.leaves(parts.decay), strict=True):
        np.testing.assert_allclose(update, -0.05 if decay else 0.0, rtol=1e-6)


@pytest.mark.parametrize(("clip_norm", "first_moment"), [(1.0, 0.1 * 0.6), (0.0, 0.1 * 3.0)])
def test_clipping_by_the_global_norm(clip_norm, first_moment):
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    optimiser = make_optimiser(OptimizerConfig(clip_norm=clip_norm, b1=0.9), {"a": True, "b": True}, {"a": (), "b": ()})
    _, state = optimiser.update({"a": jnp.float32(3.0), "b": jnp.float32(4.0)}, optimiser.init(params), params)
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    moments = [leaf for name, leaf in leaves.items() if name.endswith(".mu['a']")]
    np.testing.assert_allclose(moments, [first_moment], rtol=1e-6)


def named(tree, is_leaf=None):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def test_which_parameters_are_matrices_for_muon():
    mixers = ("delta_former", "kimi_delta_attention")
    parts = model_parts(
        ModelConfig(
            vocab_size=32, d_model=32, num_layers=4, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64, mixers=mixers
        )
    )
    shapes = named(parts.params)
    found = named(muon_matrices(parts.axes), is_leaf=lambda x: x is None or isinstance(x, tuple))
    sizes = {}
    for name, matrix in found.items():
        if matrix is not None:
            sizes[name] = tuple(int(np.prod([shapes[name].shape[place] for place in side])) for side in matrix)
    layers = {"mlp.gate": (32, 64), "mlp.up": (32, 64), "mlp.down": (64, 32)}
    layers |= {f"mixer.inputs.{name}": (32, 32) for name in ("query", "key", "value")}
    kimi = {"mixer.decay.down": (32, 16), "mixer.decay.up": (16, 32)}
    kimi |= {"mixer.output.gate_down": (32, 16), "mixer.output.gate": (16, 32), "mixer.output.output": (32, 32)}
    assert sizes == {f"blocks.0.{name}": size for name, size in ({"mixer.output": (32, 32)} | layers).items()} | {
        f"blocks.1.{name}": size for name, size in (kimi | layers).items()
    }
    assert {"embedding.table", "blocks.1.mixer.beta.kernel", "blocks.1.mixer.inputs.convolutions.0.weight"} <= (
        shapes.keys() - sizes.keys()
    )


def newton_schulz(g):
    """Five steps of Jordan's iteration on a wide matrix, in float64."""
    x = np.asarray(g, np.float64)
    x = x / np.linalg.norm(x)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_muons_first_update_by_hand():
    """Both means of the first update are multiples of its gradient, and the iteration does not see the multiple."""
    draw = np.random.default_rng(0)
    w, g = (draw.normal(size=(2, 8, 3, 4)).astype(np.float32) for _ in range(2))  # [layers, d_model, heads, head_dim]
    config = OptimizerConfig(name="muon", learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=0.0)
    optimiser = make_optimiser(config, {"w": True}, {"w": ("embed", "heads", "head_dim")})
    params = {"w": jnp.asarray(w)}
    updates, _ = optimiser.update({"w": jnp.asarray(g)}, optimiser.init(params), params)
    for layer in range(2):
        o = newton_schulz(g[layer].reshape(8, 12)).reshape(8, 3, 4)
        expected = -0.1 * (0.2 * np.sqrt(12) * o + 0.5 * w[layer])
        np.testing.assert_allclose(updates["w"][layer], expected, rtol=1e-4, atol=1e-5)


def test_each_expert_is_a_matrix_for_muon():
    assert muon_matrix(("expert", "mlp", "embed")) == muon_matrix(("mlp", "embed"))
    assert muon_matrix(("embed", "routes")) is None


def test_muon_of_each_head_by_hand():
    """Each head of each layer is a matrix of its own, d_model x head_dim, and head_dim x d_model on the way out; what
    has no heads is as ever."""
    draw = np.random.default_rng(0)
    shapes = {"in": (2, 8, 3, 4), "out": (2, 3, 4, 8), "mlp": (2, 8, 12)}  # [layers, ...]
    axes = {"in": ("embed", "kv_heads", "head_dim"), "out": ("heads", "head_dim", "embed"), "mlp": ("embed", "mlp")}
    g = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    config = OptimizerConfig(name="muon", learning_rate=0.1, warmup_steps=0, weight_decay=0.0, clip_norm=0.0)

    def updated(**fields):
        optimiser = make_optimiser(dataclasses.replace(config, **fields), dict.fromkeys(g, True), axes)
        return optimiser.update(g, optimiser.init(g), g)[0]

    updates, whole = updated(muon_per_head=True), updated()
    step = lambda g, width: (
        -0.1 * 0.2 * np.sqrt(width) * (newton_schulz(g) if g.shape[0] <= g.shape[1] else newton_schulz(g.T).T)
    )
    for layer in range(2):
        for head in range(3):
            for name, place in (("in", np.s_[layer, :, head]), ("out", np.s_[layer, head])):
                np.testing.assert_allclose(updates[name][place], step(g[name][place], 8), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(updates["mlp"], whole["mlp"])
    assert np.abs(updates["in"] - whole["in"]).max() > 0.01


def test_muon_updates_all_else_as_adamw():
    shape = ModelConfig(vocab_size=32, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64)
    parts = model_parts(shape)
    keys = jax.random.split(jax.random.key(0), 2)
    params, gradient = (
        jax.tree.map(lambda leaf, key=key: jax.random.normal(key, leaf.shape), parts.params) for key in keys
    )
    updates = {}
    for name in ("adamw", "muon"):
        optimiser = make_optimiser(OptimizerConfig(name=name, warmup_steps=0), parts.decay, parts.axes)
        updates[name] = named(optimiser.update(gradient, optimiser.init(params), params)[0])
    matrices = named(muon_matrices(parts.axes), is_leaf=lambda x: x is None or isinstance(x, tuple))
    for name, matrix in matrices.items():
        same = np.allclose(updates["muon"][name], updates["adamw"][name], rtol=1e-6)
        assert same == (matrix is None), name


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "muon" else pytest.mark.rare) for name in NAMES]
)
def test_trains_on_a_mesh_and_resumes_bit_for_bit(name, corpus, tmp_path):
    config = cases.small_config(
        corpus,
        model__head_dim=64,
        optimizer__name=name,
        optimizer__learning_rate=RATES[name],
        optimizer__accumulation_steps=2,
        mesh__data=1,
        mesh__fsdp=2,
        mesh__tensor=2,
    )
    whole = cases.run_training(config, tmp_path / "whole", devices=4)
    cases.run_training(config, tmp_path / "run", lambda steps: cases.StopAt(steps, 7), devices=4)
    again = cases.run_training(config, tmp_path / "run", devices=4)
    assert again.resumed and again.step == 12
    cases.assert_same_bits(again.state, whole.state)
    records = cases.read_metrics(tmp_path / "whole")
    assert cases.read_metrics(tmp_path / "run") == records
    losses = [record["loss"] for record in records if "loss" in record]
    # A uniform guess among 257 bytes is 5.55 nats, where all begin.
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.3
    # The arrays lie as the abstract state, from which the dry run counts memory, says.
    for leaf, abstract in zip(
        jax.tree.leaves(whole.state.opt_state), jax.tree.leaves(whole.program.abstract.opt_state), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(abstract.sharding, leaf.ndim)
        assert leaf.addressable_shards[0].data.shape == abstract.sharding.shard_shape(abstract.shape)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_of_a_parameter_is_sharded_like_it(name):
    config = cases.small_config("", model__vocab_size=257, model__d_model=128, model__mlp_dim=256, model__head_dim=64)
    config.optimizer.name = name
    program = Program(config, make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4]))
    opt_state, params = named(program.abstract.opt_state), named(program.abstract.params)
    kept = dict.fromkeys(params, 0)
    for path, leaf in opt_state.items():
        of = next((param for param in params if path.endswith(param)), None)
        if of is not None and leaf.shape == params[of].shape:
            kept[of] += 1
            assert leaf.sharding == params[of].sharding, path
    matrices = named(muon_matrices(program.parts.axes), is_leaf=lambda x: x is None or isinstance(x, tuple))
    factored = {param for param in params if param.endswith(("mlp.gate", "mlp.up", "mlp.down", "table"))}
    expected = {
        "adamw": lambda param: 2,
        "muon": lambda param: 2 if matrices[param] is None else 1,
        "lion": lambda param: 1,
        "adafactor": lambda param: 0 if param in factored else 1,
    }[name]
    assert kept == {param: expected(param) for param in params}
    if name == "adafactor":
        means = {path: leaf for path, leaf in opt_state.items() if ".v_row." in path or ".v_col." in path}
        gate = {path.split(".v_")[1][:3]: leaf for path, leaf in means.items() if path.endswith("mlp.gate")}
        # Of [2 layers, d_model 128 over fsdp, mlp 256 over tensor]: means over mlp, the larger axis, and over d_model.
        assert gate["row"].shape == (2, 128) and gate["row"].sharding.spec == PartitionSpec(None, "fsdp")
        assert gate["col"].shape == (2, 256) and gate["col"].sharding.spec == PartitionSpec(None, "tensor")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "muon" else pytest.mark.rare) for name in NAMES[1:]]
)
def test_a_skipped_step_leaves_the_state(name):
    config = cases.small_config("", model__vocab_size=257, optimizer__name=name)
    program = Program(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    row = np.tile(np.arange(32, dtype=np.int32), (8, 1))
    batch = {"tokens": row, "targets": row + 1, "segment_ids": np.ones_like(row)}
    state, _ = program.train_step(program.create_state(0), batch)
    before = jax.tree.map(np.asarray, jax.device_get(state.opt_state))
    broken = state._replace(params=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.params))
    after, metrics = program.train_step(broken, batch)
    assert float(metrics["skipped"]) == 1 and int(after.guard.made) == 1
    cases.assert_same_bits(after.opt_state, before)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_the_dry_run_counts_its_state(name, corpus, capsys):
    config = cases.small_config(corpus, optimizer__name=name)
    dry_run(config)
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if line.strip().startswith("optimiser"))
    program = Program(cases.small_config(corpus, optimizer__name=name, model__vocab_size=257), make_mesh(MeshConfig()))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(program.create_state(0).opt_state))
    assert line.split()[1:] == f"{size / 1024:.4g} KiB".split()
    query, table = (" ".join(next(line for line in lines if name in line).split()) for name in ("query", "table"))
    assert query.endswith("yes 32 x 32" if name == "muon" else "yes")
    assert table.endswith("yes -" if name == "muon" else "yes")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, r"optimizer.name = 'adam': must be one of adamw, muon, lion, adafactor; did you mean adamw"),
        ({"name": "moun"}, r"did you mean muon"),
        (
            {"name": "lion", "epsilon": 1e-6},
            r"optimizer.epsilon = 1e-06: .* 'lion' does not use it \(adamw, muon would\); leave it at 1e-08",
        ),
        ({"name": "adafactor", "b1": 0.5}, r"optimizer.b1 = 0.5: optimizer.name = 'adafactor' does not use it"),
        ({"name": "adafactor", "b2": 0.5}, r"optimizer.b2 = 0.5"),
        (
            {"muon_momentum": 0.9},
            r"optimizer.muon_momentum = 0.9: optimizer.name = 'adamw' does not use it \(muon would\)",
        ),
    ],
)
def test_names_and_fields_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        check(cases.small_config("", **{f"optimizer__{field}": value for field, value in fields.items()}))


def test_every_field_that_an_update_does_not_read_is_refused():
    """Changing a field that the check lets through changes the update."""
    params = {"w": jnp.ones((1, 4, 2, 2)), "b": jnp.ones((1, 4))}
    axes = {"w": ("embed", "heads", "head_dim"), "b": ("embed",)}
    gradients = [
        jax.tree.map(lambda p, s=s: jnp.sin(s * jnp.arange(1.0, p.size + 1)).reshape(p.shape), params) for s in (1, 2)
    ]

    def after(config):
        optimiser, now = make_optimiser(config, {"w": True, "b": False}, axes), params
        state = optimiser.init(now)
        for gradient in gradients:
            updates, state = optimiser.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(now)])

    changed = {"b1": 0.1, "b2": 0.3, "epsilon": 0.1, "muon_momentum": 0.1, "muon_per_head": True, "weight_decay": 0.9}
    for name in NAMES:
        plain = after(OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, decay_steps=20))
        for field, value in changed.items():
            config = cases.small_config("", optimizer__name=name, **{f"optimizer__{field}": value})
            try:
                check(config)
                taken = True
            except ValueError:
                taken = False
            config.optimizer.learning_rate, config.optimizer.warmup_steps = 0.1, 0
            moved = not np.array_equal(after(config.optimizer), plain)
            assert moved or not taken, (name, field)
            assert taken or not moved, (name, field)
