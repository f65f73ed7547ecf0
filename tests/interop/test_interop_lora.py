"""LoRA (`optimizer.lora_rank`): the loaded model at first, adapters alone trained, and the merged model afterwards."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from support import training_cases as cases

from deltaformer_jax import LanguageModel, convert
from deltaformer_jax.config import Mixer
from deltaformer_jax.config.checks import check
from deltaformer_jax.config.remarks import remarks
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data import batches
from deltaformer_jax.interop import load_pretrained, save_pretrained
from deltaformer_jax.layers.adapters import adapt, merged
from deltaformer_jax.layers.linear import AdaptedKernel, Adapter, product
from deltaformer_jax.model_parts import flat, merge, params_of
from deltaformer_jax.sharding.mesh import make_mesh
from deltaformer_jax.training.checkpoints.restore import restore
from deltaformer_jax.training.dry_run import dry_run
from deltaformer_jax.training.loop import describe
from deltaformer_jax.training.program import Program
from deltaformer_jax.training.step import loss_and_gradient

RANK = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return cases.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory):
    """The folder of a run that is fine-tuned: its embedding is not scaled, so that other programs open its export."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    cases.run_training(config_of(corpus, run__steps=3), folder)
    return folder


@pytest.fixture(scope="module")
def tuned(corpus, base, tmp_path_factory):
    """(the finished LoRA run, its folder)."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    return cases.run_training(lora(corpus, base), folder), folder


def config_of(corpus, **fields):
    config = cases.small_config(corpus, run__eval_every=0, **fields)
    mixers = (Mixer("softmax_attention", qk_norm=False),)
    model = dataclasses.replace(config.model, mixers=mixers, embedding_scale="one", num_kv_heads=1)
    return dataclasses.replace(config, model=model)


def lora(corpus, base, **fields):
    return config_of(corpus, **{"run__init_from": str(base), "optimizer__lora_rank": RANK, **fields})


def test_a_product_and_its_gradients_are_the_formulas():
    """Against NumPy in float64: y = x W + s (x A) B, with no gradient needed for W; kernel[...] is W + s A B."""
    draw = np.random.default_rng(0)
    x, w, a, b = (draw.standard_normal(shape) for shape in ((5, 3, 4), (3, 4, 2, 7), (3, 4, 2), (2, 2, 7)))
    with jax.enable_x64(True):

        def of(a, b):
            return AdaptedKernel(nnx.Param(jnp.asarray(w), axes=("i", "j", "k", "l")), Adapter(a), Adapter(b), 1.5)

        y = lambda a, b: product(jnp.asarray(x), of(a, b), jnp.float64, axes=2)
        whole = w + 1.5 * np.einsum("ijr,rkl->ijkl", a, b)
        np.testing.assert_allclose(y(a, b), np.einsum("tij,ijkl->tkl", x, whole), rtol=0, atol=1e-13)
        np.testing.assert_allclose(of(jnp.asarray(a), jnp.asarray(b))[...], whole, rtol=0, atol=1e-14)
        slope = draw.standard_normal((5, 2, 7))
        d_a, d_b = jax.vjp(y, a, b)[1](jnp.asarray(slope))
        d_whole = 1.5 * np.einsum("tij,tkl->ijkl", x, slope)
        np.testing.assert_allclose(d_a, np.einsum("ijkl,rkl->ijr", d_whole, b), rtol=0, atol=1e-12)
        np.testing.assert_allclose(d_b, np.einsum("ijkl,ijr->rkl", d_whole, a), rtol=0, atol=1e-12)


def test_the_first_step_sees_the_loaded_model(corpus, base):
    """The same loss bit for bit, gradients for the adapters alone, and that of A zero, since B is."""
    config, before = lora(corpus, base), restore(base)
    prepared = cases.prepare(config, base.parent / "first", devices=jax.devices()[:1])
    prepared.run.checkpoints.close()
    program, state = prepared.run.program, prepared.state
    batch = next(batches(prepared.run.corpus, "train", sequence_length=32, batch_size=8, seed=0))
    step = jax.jit(lambda params, batch: loss_and_gradient(program.parts, params, batch, 1)[:2])
    loss, gradient = step(state.params, batch)
    plain, _ = jax.jit(lambda params, batch: loss_and_gradient(before.program.parts, params, batch, 1)[:2])(
        before.params, batch
    )
    assert float(loss) == float(plain)
    gradient = dict(flat(gradient))
    assert {path[-1] for path in gradient} == {"down", "up"}
    kernels = {".".join(path[2:-1]) for path in gradient}
    attention = {f"mixer.inputs.{name}" for name in ("query", "key", "value")}
    assert kernels == {*attention, "mixer.output", "mlp.gate", "mlp.up", "mlp.down"}
    for path, slope in gradient.items():
        assert np.any(slope) == (path[-1] == "up"), path
    # The optimiser keeps two moments of the adapters, and nothing of the other parameters.
    trained = sum(slope.size for slope in gradient.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * trained
    assert f"{trained:,} parameters trained, of rank 2; " in describe(prepared.run, prepared.position)


def test_only_adapters_change(base, tuned):
    run, _ = tuned
    before, after = dict(flat(restore(base).params)), dict(flat(run.state.params))
    changed = {path for path, leaf in after.items() if path[-1] in ("down", "up") and np.any(leaf)}
    assert {path[-1] for path in changed} == {"down", "up"} and len(changed) == 2 * 7
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf, after[path] if path in after else after[(*path, "kernel")])
    assert len(after) == len(before) + len(changed)


def test_merged_on_reading_and_on_export(base, tuned, tmp_path):
    """`restore`, by which programs read a run, and the folder for other programs hold W + s A B: the run's logits."""
    run, folder = tuned
    program = run.program
    tokens = jax.random.randint(jax.random.key(0), (2, 24), 0, 256)
    logits, _ = merge(program.parts, run.state.params)(tokens)
    read = restore(folder)
    assert jax.tree.structure(read.params) == jax.tree.structure(restore(base).params)
    (folder / "tasks").mkdir()
    found = {"step": 12, "tasks": {"some_task": {"acc": 0.5, "alias": "x"}}}
    found["long_context"] = [{"task": "needle", "length": 256, "depth": 0.5, "examples": 2, "accuracy": 1.0}]
    (folder / "tasks" / "tasks.json").write_text(json.dumps(found))
    convert.main(["--to-hf", "--workdir", str(folder), "--out", str(tmp_path / "out")])
    card_says((tmp_path / "out" / "README.md").read_text(), base, folder)
    save_pretrained(merge(program.parts, run.state.params), read.config.model, tmp_path / "saved")
    assert "- LoRA: adapters of rank 2, added to their kernels." in (tmp_path / "saved" / "README.md").read_text()
    exported, config = load_pretrained(tmp_path / "out")
    assert config.mixers and (tmp_path / "out" / "config.json").read_text().count('"model_type": "llama"') == 1
    # A sum of n products in float32 is off by at most n 2^-24 of the sum of their sizes, and the sizes of x W and x A B
    # are at most those of a layer's inputs, normed, times the kernels': below 8 in each of the two layers' seven maps.
    bound = 2 * 7 * 64 * 2.0**-24 * 8
    for model in (merge(read.program.parts, read.params), exported):
        np.testing.assert_allclose(model(tokens)[0], logits, rtol=0, atol=bound)


def card_says(card, base, folder):
    """The base model, the data, the adapters, the scores, and a config file that is the run's."""
    saved = Saved.read(epath.Path(folder)).config
    assert f"- Base model: `{base}`.\n" in card and f"- Training data: `{saved.data.path}`." in card
    assert "rank 2, alpha 16, on the kernels `mixer.*`, `mlp.*`; the change is added" in card
    assert "documents, " in card and "12 steps of 8 rows of 32 tokens, seed 0, by adamw" in card
    assert (
        "| some_task | acc | 0.5000 | 12 |\n" in card and "needle | accuracy at 256 tokens, depth 0.5 | 1.0000" in card
    )
    code = card.split("```python\n")[1].split("```")[0]
    exec(code, names := {})
    assert names["get_config"]() == saved


def test_resumes_bit_for_bit(corpus, base, tuned, tmp_path):
    config = lora(corpus, base)
    cases.run_training(config, tmp_path / "again", stop=lambda steps: cases.StopAt(steps, 5))
    again = cases.run_training(config, tmp_path / "again")
    assert again.resumed
    jax.tree.map(np.testing.assert_array_equal, again.state, tuned[0].state)


@pytest.mark.long
def test_sharded_equals_one_device(corpus, base, tuned, tmp_path):
    """Adapters are sharded like the kernels' axes that they share. Sums are made in another order on a mesh."""
    config = lora(corpus, base, mesh__fsdp=2, mesh__tensor=2, mesh__data=1)
    run = cases.run_training(config, tmp_path / "mesh", devices=4)
    block = run.program.shardings.params["blocks"][0]
    assert tuple(block["mlp"]["up"]["down"].spec) == (None, "fsdp", None)
    assert tuple(block["mlp"]["up"]["up"].spec) == (None, None, "tensor")
    assert tuple(block["mixer"]["output"]["down"].spec) == (None, "tensor", None, None)
    one = [record["loss"] for record in tuned[0].metrics.records]
    many = [record["loss"] for record in run.metrics.records]
    assert many == pytest.approx(one, rel=1e-4)
    assert one[-1] < one[0]


def test_what_is_refused(corpus, base):
    mesh = make_mesh(lora(corpus, base).mesh, jax.devices()[:1])
    for fields, message in (
        (
            {"optimizer__lora_kernels": ("mlp.*", "mixer.keys")},
            r"lora_kernels: 'mixer.keys' matches no kernel.*mlp\.up",
        ),
        (
            {"optimizer__lora_rank": 17},
            r"lora_rank = 17: above 16, the smaller side of the kernel mixer.inputs.key, 32 x",
        ),
    ):
        config = lora(corpus, base, **fields)
        check(config)
        config.model.vocab_size = 257
        with pytest.raises(ValueError, match=message):
            Program(config, mesh)
    for fields, message in (
        ({"optimizer__lora_rank": -1}, r"optimizer\.lora_rank = -1: must be at least 0"),
        ({"optimizer__lora_alpha": 0.0}, r"optimizer\.lora_alpha = 0\.0: must be above 0"),
        ({"optimizer__lora_kernels": (Mixer("mlp"),)}, r"optimizer\.lora_kernels = .*: must be a tuple of names, at"),
        (
            {"run__init_from": ""},
            r"optimizer\.lora_rank = 2: LoRA adapts a trained model; name its folder in run\.init",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            check(lora(corpus, base, **fields))
    unused = remarks(config_of(corpus, optimizer__lora_alpha=8.0, optimizer__lora_kernels=("mlp.*",)))
    assert [line.partition(" ")[0] for line in unused] == ["optimizer.lora_alpha", "optimizer.lora_kernels"]


def test_the_dry_run_says_what_is_trained(corpus, base, capsys):
    dry_run(lora(corpus, base, optimizer__lora_kernels=("mlp.*",)))
    text = capsys.readouterr().out
    trained = 2 * 3 * RANK * (32 + 64)  # layers, kernels
    frozen = int(text.split("parameters  ")[1].split("\n")[0].replace(",", "")) - trained
    assert f"LoRA        {trained:,} parameters trained, of rank 2; {frozen:,} frozen\n" in text
    rows = {line.split()[0]: line.split()[-1] for line in text.splitlines() if "blocks.0.mlp.up" in line}
    assert rows == {"blocks.0.mlp.up.kernel": "frozen", "blocks.0.mlp.up.down": "yes", "blocks.0.mlp.up.up": "yes"}


@pytest.mark.long
@pytest.mark.parametrize(
    "mixers",
    [
        ("gated_delta_net", "kimi_delta_attention"),
        ("delta_former", "retention"),
        pytest.param(("gated_delta_net_2", "rwkv7"), marks=pytest.mark.rare),
    ],
)
def test_every_mixer_adapted_and_merged(mixers):
    """B = 0 changes nothing; B ≠ 0 does, and the merged model then has the same outputs."""
    config = dataclasses.replace(
        cases.small_config("").model, mixers=mixers, vocab_size=257, implementation="", num_layers=2
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    adapted = adapt(model, RANK, 8.0, ("mixer.*", "mlp.*"), rngs=nnx.Rngs(1))
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 256)
    plain = model(tokens)[0]
    np.testing.assert_array_equal(adapted(tokens)[0], plain)
    moved = jax.tree.map(lambda x: x + 0.02, adapted)
    after = moved(tokens)[0]
    assert np.abs(after - plain).max() > 1e-2
    np.testing.assert_allclose(merged(moved)(tokens)[0], after, rtol=0, atol=2e-5 * np.abs(after).max())
    assert jax.tree.structure(params_of(merged(moved))) == jax.tree.structure(params_of(model))
    assert adapted.flops_per_token(16) > model.flops_per_token(16)
