"""The program `inspect`: the scalars of KV shifting, of a run of which some layers have it, and M(X)."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from support import training_cases as cases

from deltaformer_jax.config import Mixer
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data import batches, load_data
from deltaformer_jax.inspect import __main__ as inspect
from deltaformer_jax.model_parts import merge, model_parts
from deltaformer_jax.surgery import token_change
from deltaformer_jax.training.checkpoints.new_run import write_run
from deltaformer_jax.training.checkpoints.restore import restore

MIXERS = (
    Mixer("softmax_attention", kv_shift=True),
    "softmax_attention",
    Mixer("softmax_attention", kv_shift=True, kv_shift_window=3, kv_shift_parts="key"),
)
GROUPS = 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of a run with KV shifting in four of six layers, and of one without. Nothing is trained."""
    folder, made = tmp_path_factory.mktemp("inspect"), {}
    spec = "task:induction,vocabulary=16,words=6,score=all"
    data, rng = load_data(spec), np.random.default_rng(0)
    for name, mixers in (("with", MIXERS), ("without", MIXERS[1:2])):
        small = dict(data__sequence_length=8, model__num_layers=2 * len(mixers), model__mixers=mixers)
        config = cases.small_config(spec, model__vocab_size=16, **small)
        shapes = model_parts(config.model).params
        params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
        made[name] = folder / name
        write_run(epath.Path(made[name]), Saved(config, data.tokenizer.hash, data.hash), params, data.tokenizer, {})
    return made


def test_the_signs_of_a_run(runs, capsys):
    inspect.main(["kv_shift", "--workdir", str(runs["with"])])
    said = capsys.readouterr()
    found, blocks = json.loads(said.out), restore(runs["with"]).params["blocks"]
    assert [(head["layer"], head["head"]) for head in found["heads"]] == [(l, h) for l in (0, 2, 3, 5) for h in (0, 1)]
    assert found["step"] == 0 and sum(found["kv_shift"].values()) == 4 * GROUPS
    expected = dict.fromkeys(found["kv_shift"], 0)
    for head in found["heads"]:
        shift = blocks[head["layer"] % 3]["mixer"]["inputs"]["shift"]
        names = set(head) - {"layer", "head"}
        assert names == set(shift)
        for name in names:
            np.testing.assert_array_equal(head[name], shift[name][head["layer"] // 3, ..., head["head"]])
        key = head["current_key"] > head["previous_key"]
        value = "current_value" not in head or head["current_value"] > head["previous_value"]
        expected[f"key {'-+'[key]} value {'-+'[value]}"] += 1
    assert found["kv_shift"] == expected
    counts = list(expected.values())
    assert [line.split()[-2:] for line in said.err.splitlines()[-2:]] == [
        [str(a), str(b)] for a, b in (counts[:2], counts[2:])
    ]


def test_the_change_from_token_to_token(runs, capsys):
    """M by layer against NumPy; documents and padding count by themselves."""
    inspect.main(["token_change", "--workdir", str(runs["without"]), "--batches", "1"])
    said = capsys.readouterr()
    found, run = json.loads(said.out), restore(runs["without"])
    model = merge(run.program.parts, run.params)
    sizes = dict(sequence_length=run.config.data.sequence_length, batch_size=run.config.data.batch_size)
    batch = next(batches(load_data(run.config.data.path), "eval", **sizes, seed=0))
    assert np.allclose(found["by_layer"], by_hand(model, batch), rtol=1e-5) and len(found["by_layer"]) == 2
    assert found["M(X)"] == np.mean(found["by_layer"]) and said.err.splitlines()[-1].split()[0] == "1"
    ids = np.ones_like(batch["tokens"])
    ids[:, 3:], ids[0], ids[1, -2:] = 2, 5, 0
    packed = {"tokens": batch["tokens"], "segment_ids": ids}
    np.testing.assert_allclose(token_change(model, [packed]), by_hand(model, packed), rtol=1e-5)
    with pytest.raises(ValueError, match="no token follows another"):
        token_change(model, [packed | {"segment_ids": np.zeros_like(ids)}])


def by_hand(model, batch):
    ids = np.asarray(batch["segment_ids"])
    _, streams = model.look(batch["tokens"], lambda before, after, real: after, segment_ids=ids)
    streams, sums, count = np.asarray(streams, np.float64), 0.0, 0
    for row, t in np.argwhere(ids > 0):
        if t > 0 and ids[row, t] == ids[row, t - 1]:
            now, before = streams[:, row, t], streams[:, row, t - 1]
            sums = sums + np.linalg.norm(now - before, axis=-1) / np.linalg.norm(before, axis=-1)
            count += 1
    return sums / count


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["kv_shift", "--workdir", "{without}"],
            "no layer of its model shifts keys or values; train one with model.kv",
        ),
        (["kv_shift", "--workdir", "{with}", "--step", "7"], "--step 7: no such checkpoint"),
        (["kv_shift", "--workdir", "nowhere"], "nowhere"),
        (["kv_shfit", "--workdir", "{with}"], "'kv_shfit': give what to inspect, one of kv_shift, token_change; did"),
        (["--workdir", "{with}"], "no part: give what to inspect, one of kv_shift, token_change"),
        (
            ["kv_shift", "--workdir", "{with}", "--batches", "2"],
            "--batches: kv_shift is read from the parameters alone",
        ),
        (["token_change", "--workdir", "{with}", "--batches", "0"], "--batches 0: give 1 or more"),
        (["kv_shift"], "--workdir"),
    ],
)
def test_wrong_input_is_one_line(runs, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        inspect.main([flag.format(**runs) for flag in flags])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" ...")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0], lines
