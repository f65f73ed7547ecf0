"""The mixer and the similarity of docs/own_mixers.md, which live outside the package: trained, resumed, decoded,
sampled from, evaluated."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from deltaformer_jax import (
    AttentionCache,
    DeltaFormer,
    LanguageModel,
    Mixer,
    ModelConfig,
    StateCache,
    delta_attention,
    train,
)
from deltaformer_jax.config import Config
from deltaformer_jax.config.checks import check
from deltaformer_jax.config.saved import Saved, from_json, to_json
from deltaformer_jax.data import prepare_corpus
from deltaformer_jax.evaluate import __main__ as evaluate
from deltaformer_jax.sample import __main__ as sample

PAGE = (Path(__file__).parents[2] / "docs" / "own_mixers.md").read_text(encoding="utf-8")
MODULE = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]


@pytest.fixture
def memories(tmp_path, monkeypatch):
    """The page's module, on Python's path."""
    assert len(MODULE.splitlines()) <= 60
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "memories.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.delitem(sys.modules, "memories", raising=False)
    import memories

    yield memories
    sys.modules.pop("memories", None)


def tiny(**fields):
    sizes = dict(vocab_size=30, d_model=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=16)
    return ModelConfig(**sizes | fields)


def test_the_page_s_config_makes_a_model(memories):
    names = {}
    exec(re.search(r"``` python\n(.*?)```", PAGE, re.S)[1], names)
    config = dataclasses.replace(names["config"], vocab_size=30, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8)
    assert LanguageModel(config, rngs=nnx.Rngs(0)).blocks[0].mixer.width == 64


def test_decoding_is_the_full_forward(memories):
    config = tiny(mixers=(Mixer(memories.LeakyAverage, width=5), "delta_former"), write_similarity="memories:Cubic")
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    assert model.blocks[0].mixer.width == 5 and model.blocks[1].mixer.write_similarity.given == memories.Cubic()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 12)))
    whole, _ = model(tokens)
    cache, pieces = model.init_cache(2, 12), []
    for start, stop in ((0, 7), (7, 8), (8, 12)):
        piece, cache = model(tokens[:, start:stop], cache=cache)
        pieces.append(piece)
    # float32 sums of 16 products in another order, through two layers.
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=0, atol=1e-5)
    assert cache[0].length.tolist() == [[12, 12]]
    assert model.flops_per_token(12) > 0


def test_documents_and_padding_are_kept_apart(memories):
    model = LanguageModel(tiny(num_layers=1, mixers=(Mixer(memories.LeakyAverage),)), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 30, (1, 9)))
    packed, _ = model(tokens, segment_ids=jnp.asarray([[1, 1, 1, 0, 0, 2, 2, 2, 2]]))
    np.testing.assert_allclose(packed[:, :3], model(tokens[:, :3])[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(packed[:, 5:], model(tokens[:, 5:])[0], rtol=0, atol=1e-6)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_programs_find_them(memories, tmp_path, monkeypatch, capsys):
    """Without --config: their names stand in config.json."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(12):
        (text / f"{i}.txt").write_text(f"document {i} " + "with words and words " * 30)
    prepare_corpus(str(text), tmp_path / "data", tokenizer="bytes", workers=1)
    fields = {
        "model.mixers": "('memories:LeakyAverage', 'delta_former')",
        "model.write_similarity": "memories:Cubic",
        "model.num_layers": 2,
        "model.d_model": 16,
        "model.num_heads": 2,
        "model.num_kv_heads": 1,
        "model.head_dim": 8,
        "model.mlp_dim": 16,
        "data.path": tmp_path / "data",
        "data.sequence_length": 32,
        "data.batch_size": 8,
        "run.eval_every": 0,
        "run.log_every": 1,
        "run.sample_tokens": 4,
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]

    def program(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        train.main()

    program("--workdir", tmp_path / "whole", *flags, "--config.run.steps=4")
    program("--workdir", tmp_path / "parts", *flags, "--config.run.steps=2")
    program("--workdir", tmp_path / "parts", "--config.run.steps=4")

    def losses(run):
        records = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if "loss" in record]

    assert len(losses("whole")) == 4 and losses("parts") == losses("whole")
    capsys.readouterr()
    sample.main(["--workdir", str(tmp_path / "whole"), "--prompt", "doc", "--tokens", "5", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 5
    evaluate.main(["--workdir", str(tmp_path / "whole"), "--data", str(text / "1.txt")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bits_per_byte"] > 0


@pytest.mark.parametrize("module", ["memories", "runs.evil.memories", "runs.evil.deeper.memories"])
def test_a_run_folder_runs_no_code(memories, tmp_path, monkeypatch, module):
    """A module that would be imported from the run's own folder is refused, however its name gets there."""
    folder = tmp_path / "path" if module == "memories" else tmp_path / "path" / "runs" / "evil"
    (folder / "deeper").mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / "deeper"):
        (place / "memories.py").write_text("raise SystemExit('this ran')")
    sys.modules.pop("memories")
    config = Config(model=tiny(vocab_size=0, mixers=(f"{module}:LeakyAverage",)))
    Saved(config, "", "").write(epath.Path(folder))
    with pytest.raises(ValueError, match=rf"'{module}:LeakyAverage' lies in the run's folder, .*; modules"):
        Saved.read(epath.Path(folder))


@pytest.mark.parametrize("name", ["__main__:Own", "config_config:Own", "support.ops_cases:f.<locals>.Own"])
def test_what_no_import_finds_again_is_no_programs(name):
    module, _, qualified = name.partition(":")
    own = type("Own", (NoLength,), {"__module__": module, "__qualname__": qualified})
    with pytest.raises(ValueError, match="was defined in a function, a notebook or a config file"):
        check(Config(model=tiny(mixers=(Mixer(own, needed=1),))))


def test_overrides_are_what_config_json_can_hold():
    config = Config(model=tiny(mixers=(Mixer(NoLength, needed=[3, [4, 5]]),)))
    check(config)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    for value in ({"w": 4}, object(), np.ones(3), (1, {})):
        with pytest.raises(
            ValueError, match=r"NoLength, needed = .*: config.json can hold only numbers, strings, booleans"
        ):
            check(Config(model=tiny(mixers=(Mixer(NoLength, needed=value),))))


class NoCache(nnx.Module):
    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        pass

    def __call__(self, x, *, segment_ids=None, positions=None, cache=None):
        return x


class NoLength(NoCache):
    def __init__(self, d_model: int, *, needed: int, rngs: nnx.Rngs):
        pass

    def __call__(self, x, *, segment_ids=None, positions=None, cache=None):
        return x, cache

    def init_cache(self, batch, capacity):
        return jnp.zeros(batch)

    def flops_per_token(self, length):
        return 0.0


class Named(NoLength):
    def __init__(self, features: int, *, rngs: nnx.Rngs):
        pass


class Bare(NoCache):
    """A call that cannot be told of documents."""

    init_cache, flops_per_token = NoLength.init_cache, NoLength.flops_per_token

    def __call__(self, x):
        return x, None


class Fails(NoLength):
    def __init__(self, d_model: int, *, rngs: nnx.Rngs):
        int("no number")


@pytest.mark.parametrize(
    "mixer, message",
    [
        (Mixer(NoCache), "NoCache has no method init_cache"),
        (Mixer(dict), "dict is not a subclass of flax.nnx.Module"),
        (Mixer(NoLength, needed=1, other=2), "an override of .*NoLength: 'other' is not one of 'needed'"),
        (Mixer(NoLength), r"NoLength needs needed: give Mixer\(.*, needed=...\)"),
        (Mixer(Named), "the constructor of .*Named has no argument d_model"),
        (Mixer(Bare), "Bare.__call__ has no argument segment_ids"),
        (".relative:Mixer", "'.relative:Mixer' is not one of 'delta_former'"),
        ("no_such_module:Mixer", "there is no module 'no_such_module' on Python's path; install it, or set PYTHONPATH"),
        ("json:Mixer", "the module 'json' has no 'Mixer'"),
    ],
)
def test_what_is_no_mixer(mixer, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: LanguageModel(tiny(mixers=(mixer,)), rngs=nnx.Rngs(0)))


class Wider(DeltaFormer):
    """What one would write to change a mixer in little."""

    def __init__(self, d_model: int, *, extra: int = 1, **others):
        super().__init__(d_model, **others)
        self.extra = extra


def test_a_subclass_hands_on_what_its_parent_names():
    model = LanguageModel(tiny(mixers=(Mixer(Wider, extra=3, num_heads=4),)), rngs=nnx.Rngs(0))
    mixer = model.blocks[0].mixer
    assert mixer.extra == 3 and mixer.num_heads == 4 and mixer.num_kv_heads == 1


def test_an_error_of_the_class_itself_is_left_alone():
    with pytest.raises(ValueError, match=r"^invalid literal for int"):
        LanguageModel(tiny(mixers=(Mixer(Fails),)), rngs=nnx.Rngs(0))


def test_what_does_not_keep_to_the_protocol(monkeypatch):
    model = LanguageModel(tiny(mixers=(Mixer(NoLength, needed=1),)), rngs=nnx.Rngs(0))
    for cache, message in (
        (jnp.zeros(1), "has no attribute length"),
        (AttentionCache(jnp.zeros((2, 1)), None), "must be a pytree of arrays whose first axis is the batch"),
        (StateCache(jnp.zeros((1, 2)), (), jnp.zeros(1)), "has no attribute length, int32"),
    ):
        monkeypatch.setattr(NoLength, "init_cache", lambda *_, cache=cache: cache)
        with pytest.raises(ValueError, match=f"the cache of NoLength {message}"):
            model.init_cache(1, 4)
    monkeypatch.setattr(NoLength, "__call__", lambda self, x, **_: (x.astype(jnp.bfloat16), None))
    with pytest.raises(ValueError, match=r"NoLength returned y bfloat16\[1, 4, 16\] for x float32\[1, 4, 16\]"):
        jax.eval_shape(lambda: model(jnp.zeros((1, 4), jnp.int32)))
    monkeypatch.setattr(NoLength, "__call__", NoCache.__call__)
    with pytest.raises(ValueError, match=r"NoLength returned a .*, not \(y, cache\)"):
        jax.eval_shape(lambda: model(jnp.zeros((1, 4), jnp.int32)))


def test_a_similarity_without_a_slope_is_differentiated():
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 9, 2, 4)) for i in range(3))

    def gradient(implementation):
        total = lambda q: delta_attention(
            q, k, v, write_similarity=jnp.tanh, read_similarity=jnp.sin, implementation=implementation, chunk_size=4
        ).sum()
        return jax.grad(total)(q)

    # Sums of nine terms below 1 in float32, in another order.
    np.testing.assert_allclose(gradient("chunked"), gradient("recurrent"), rtol=0, atol=1e-5)
