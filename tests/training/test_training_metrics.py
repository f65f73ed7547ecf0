"""The metrics file is cut back and mended; the display says the same on a terminal and in a log."""

import json
import types

import pytest

from deltaformer_jax.training.watch.display import Display
from deltaformer_jax.training.watch.metrics import MetricsFile
from deltaformer_jax.training.watch.peak import peak_flops, utilisation


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_cut_back_to_a_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": 1 / step})
    file.write({"step": 3, "eval_loss": 0.1})
    assert len(lines(path)) == 4 and file.evaluation(3) and not file.evaluation(2)

    again = MetricsFile(path, 2)
    assert [record["step"] for record in lines(path)] == [1, 2] == [record["step"] for record in again.records]
    assert not again.evaluation(3)
    again.write({"step": 3, "loss": 0.5})
    assert lines(path)[-1] == {"step": 3, "loss": 0.5} and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "\n", "null\n", '{"no step": 1}\n', '{"step": 3', "[3]\n"])
def test_half_a_line_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n' + tail)
    MetricsFile(path, 10).write({"step": 3, "loss": 1.0})
    assert [record["step"] for record in lines(path)] == [1, 2, 3]


def test_numbers_keep_their_bits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsFile(path, 0).write({"step": 1, "loss": 0.1 + 0.2})
    assert MetricsFile(path, 1).records[0]["loss"] == 0.1 + 0.2


def test_a_log_gets_one_line_per_record(capsys):
    display = Display(1000, 0)
    display.advance(10)
    record = {"step": 10, "loss": 2.34567, "tokens_per_second": 12345.6, "grad_norm": 0.5, "learning_rate": 1e-3}
    display.log(record, seconds_per_step=2.0)
    display.evaluation({"step": 10, "eval_loss": 1.5, "eval_bits_per_byte": 2.164}, seconds=3.0)
    both = {"eval_accuracy": 0.5, "eval_bits_per_byte": 2.164}
    display.evaluation({"step": 20, "eval_loss": 1.5, **both}, seconds=3.0)
    display.evaluation({"step": 30, "eval_loss": 1.5, "eval_accuracy": 0.5}, seconds=3.0)
    display.note("[brackets] are text")
    display.close()
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "step 10/1000  loss 2.3457  12.3k tokens/s  MFU -  eta 33:00  gradient 0.5",
        "step 10/1000  evaluation: 2.1640 bits per byte, loss 1.5000  (3.0 s)",
        "step 20/1000  evaluation: accuracy 0.5000, 2.1640 bits per byte, loss 1.5000  (3.0 s)",
        "step 30/1000  evaluation: accuracy 0.5000, loss 1.5000  (3.0 s)",
        "[brackets] are text",
    ]


def test_a_log_shows_the_utilisation_where_the_peak_is_known(capsys):
    record = {"step": 10, "loss": 2.0, "tokens_per_second": 64300.0, "mfu": 0.1723, "grad_norm": 0.5}
    Display(1000, 0).log(record, None)
    assert "64.3k tokens/s  MFU 17.2 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_the_kind_of_device(kind, peak):
    assert peak_flops(kind) == peak
    devices = [types.SimpleNamespace(device_kind=kind)] * 4
    # deltaformer_340m's 2.65 GFLOP a token at a million tokens a second on four devices.
    found = utilisation(1e6, 2.65e9, devices)
    assert found is None if peak is None else found == pytest.approx(2.65e15 / 4 / peak)


def test_quiet_is_silent(capsys):
    display = Display(10, 0, quiet=True)
    display.note("x")
    display.close()
    assert capsys.readouterr().out == ""
