"""The programs `extend` and `drift`, and what they are made of."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from support import training_cases as cases

from deltaformer_jax import drift, extend
from deltaformer_jax.config import Config, Mixer, ModelConfig
from deltaformer_jax.config.remarks import remarks
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.extension.as_config import argument, get_config
from deltaformer_jax.extension.plan import clean_base, extended
from deltaformer_jax.extension.recall import PASSAGE, START, distances, recall

# ml_collections loads config files in a way that Python is going to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The folder of a run of a few steps on rows of 32 tokens."""
    folder = tmp_path_factory.mktemp("extend")
    corpus = cases.make_corpus(folder)
    cases.run_training(cases.small_config(corpus, run__steps=4, model__rope_base=2000.0), folder / "run")
    return str(folder / "run")


def test_the_least_clean_base_of_all_widths():
    """The least bases for 1,024 tokens are 59,000 at a width of 32 and 7,800 at one of 64 (arXiv 2405.14591)."""
    model = ModelConfig(head_dim=64, rope_base=10_000.0)
    assert clean_base(dataclasses.replace(model, rope_base=100.0), 1024) == 7800
    assert clean_base(model, 1024) == 14_000  # no smaller than it was; 10,000 has distances without likeness
    narrow = Mixer("softmax_attention", head_dim=32)
    assert clean_base(dataclasses.replace(model, mixers=("delta_former", narrow)), 1024) == 59_000
    assert clean_base(dataclasses.replace(model, rotary_fraction=0.5), 1024) == 59_000
    windowed = Mixer("softmax_attention", window=64, head_dim=32)  # 320 is clean for 64 tokens
    assert clean_base(dataclasses.replace(model, mixers=(windowed,), rope_base=100.0), 1024) == 320
    for without in (dict(rope_base=0.0), dict(mixers=("delta_net",))):
        assert clean_base(dataclasses.replace(model, **without), 1024) is None


def test_the_config_of_an_extension():
    before = Config()
    before.model.num_layers, before.model.head_dim = 12, 64
    before.model.mixers = (Mixer("delta_former", rope_base=500.0), "softmax_attention")
    before.data.sequence_length, before.data.batch_size, before.optimizer.accumulation_steps = 1024, 32, 2
    four, far = (extended(before, "DIR", to, "longred", 100) for to in (4096, 16384))
    assert four.model.rope_base == dict(four.model.mixers[0].overrides)["rope_base"] == clean_base(before.model, 4096)
    assert (four.data.sequence_length, four.data.batch_size) == (4096, 8) and far.data.batch_size == 2
    assert four.objective.layers == "kl:6" and four.objective.skip == "cream" and far.objective.layers == "kl:3"
    assert (far.objective.alpha_short, far.objective.alpha_s2l, far.objective.skip) == (2.0, 15.0, "uniform")
    assert four.optimizer.learning_rate == pytest.approx(before.optimizer.learning_rate / 10)
    assert (four.run.init_from, four.run.steps, four.optimizer.schedule) == ("DIR", 100, "constant")
    plain = extended(before, "DIR", 4096, "plain", 1, base=5e5)
    assert plain.objective == Config().objective and not remarks(plain)  # no setting that nothing reads
    before.model.mixers = ("delta_net",)
    other = extended(before, "DIR", 4096, "longred", 1)
    assert other.objective.layers == "uniform:6" and other.model.rope_base == before.model.rope_base
    before.model.rope_base = 0.0
    with pytest.raises(ValueError, match="rope_base: no layer of this model has a rotary embedding"):
        extended(before, "DIR", 4096, "longred", 1, base=1e5)


def test_the_config_is_passed_through_a_flag(before):
    """Whatever the folder's name has in it."""
    text = argument(before, 128, "mixed", 7, 3e4)
    assert get_config(text) == extended(Saved.read(epath.Path(before)).config, before, 128, "mixed", 7, 3e4)
    assert ":" not in argument("gs://a b/c&d=e", 128, "plain", 7, None)


def test_recall_by_distance():
    """A model that remembers the last 150 tokens: 1 nat for a token not seen among them, else 0.25."""
    assert distances(97) == [64] and distances(200) == [64, 128, 167]
    with pytest.raises(ValueError, match="rows need at least 97 tokens"):
        distances(96)
    texts = (np.arange(201) + 1000 * i for i in range(99))  # all tokens are different
    seen = []

    def nats(batch):
        assert batch["tokens"].shape == (8, 200) and (batch["segment_ids"] == 1).all()
        assert (batch["tokens"][:, 1:] == batch["targets"][:, :-1]).all()
        seen.extend(batch["targets"])
        rows = []
        for tokens, targets in zip(batch["tokens"], batch["targets"]):
            past = [tokens[max(0, t - 149) : t + 1] for t in range(200)]
            rows.append([0.25 if target in before else 1.0 for target, before in zip(targets, past)])
        return jnp.array(rows)

    found = recall(nats, texts, 200, 8, 5)
    assert [(one.distance, one.unseen, one.saved) for one in found] == [(64, 1, 0.75), (128, 1, 0.75), (167, 1, 0)]
    assert len(seen) == 2 * 16  # of 3 · 5 passages, and one more to fill a batch
    repeated = [len(row) - len(set(row.tolist())) for row in seen]
    assert repeated == [0, PASSAGE] * 16 and START < PASSAGE


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--to", "32"], "--to 32: the run in RUN has a context of 32 tokens; give a longer one"),
        (["--to", "0"], "--to 0: give 1 or more"),
        (["--to", "64", "--base", "0.5"], "--base 0.5: must be greater than 1"),
        (["--to", "64", "--steps", "0"], "--steps 0: give 1 or more"),
        (["--to", "64", "--config", "tiny"], "--config: the config is made from the run in RUN"),
        (["--to", "64", "more"], "'more': not a flag"),
        (["--to", "64", "--methd", "plain"], "--methd: no such flag; did you mean method?"),
        (["--to", "64", "--config.model.d_modle=3"], "--config.model.d_modle: no such field; did you mean"),
        (["--to", "64", "--config.data.batch_size=8", "--config.model.mlp_dim=96"], "mlp_dim: 64 there, 96 here"),
        (["--to", "64", "--workdir", "/nowhere"], "--workdir /nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(before, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit_:
        extend.main(["--workdir", before, "--out", str(tmp_path / "new"), *flags])
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1 and message.replace("RUN", before) in errors[0]
    assert not (tmp_path / "new").exists()


def test_drift_of_another_architecture_is_refused(before, tmp_path, capsys):
    corpus = Saved.read(epath.Path(before)).config.data.path
    cases.run_training(
        cases.small_config(corpus, run__steps=1, run__eval_every=0, model__num_layers=1), tmp_path / "run"
    )
    for other, message in (
        (tmp_path / "run", "not the same architecture: model.num_layers: 1 there, 2 here"),
        (tmp_path / "none", "no such folder"),
    ):
        with pytest.raises(SystemExit):
            drift.main(["--teacher", str(other), "--workdir", before])
        assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_run_is_extended_and_compared(before, tmp_path, capsys):
    out = tmp_path / "new"
    flags = ["--workdir", before, "--to", "128", "--out", str(out), "--steps", "2", "--tokens", "512"]
    flags.append("--config.data.batch_size=8")  # of the tests' 8 devices
    extend.main([*flags, "--config.objective.cycle=2,1,1"])
    printed = capsys.readouterr()
    found = json.loads(printed.out.splitlines()[-1])
    assert json.loads((out / "extension.json").read_text()) == found
    assert (out / "extension.png").read_bytes()[1:4] == b"PNG"
    assert found["after"]["step"] == 2 and found["method"] == "longred"
    assert (
        found["before"]["rope_base"] == 2000
        and found["after"]["rope_base"] == Saved.read(epath.Path(out)).config.model.rope_base
    )
    for when in ("before", "after"):
        assert [one["distance"] for one in found[when]["recall"]] == [64, 95]
        assert found[when]["long"]["by_position"][-1]["to"] <= 128 and found[when]["short"]["tokens"] > 200
    assert re.search(r"nats, positions above 32 +\d", printed.err) and "stretched distance" in printed.err + printed.out
    drift.main(["--teacher", before, "--workdir", str(out), "--batches", "1"])
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(measured["similarity"]) == 2 and all(0.5 < value < 1 for value in measured["similarity"])
    assert all(value > 0 for value in measured["read"] + measured["write"])
    for wrong, message in (
        (["--to", "256"], "data.sequence_length: 128 in the run, 256 asked for"),
        (["--method", "mixed"], "objective.name: 'longred' in the run, 'mixed' asked for"),
    ):
        with pytest.raises(SystemExit):
            extend.main([*flags, *wrong])
        assert message in capsys.readouterr().err
