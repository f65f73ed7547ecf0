"""What a run keeps besides its checkpoints (those are orbax's business), under gs://."""

import json

import pytest
from etils import epath
from support import training_cases as cases
from support.object_store import bucket

from deltaformer_jax.config.command_line import parse
from deltaformer_jax.config.files import config_folder
from deltaformer_jax.config.saved import Saved
from deltaformer_jax.data import ByteTokenizer
from deltaformer_jax.training.checkpoints.restore import read_tokenizer
from deltaformer_jax.training.watch.metrics import MetricsFile


def test_metrics_are_kept_and_cut_back(tmp_path):
    with bucket(tmp_path):
        file = MetricsFile(epath.Path("gs://bucket/metrics.jsonl"), 0)
        for step in (1, 2, 3):
            file.write({"step": step, "loss": 1 / step})
        assert MetricsFile(epath.Path("gs://bucket/metrics.jsonl"), 2).records == file.records[:2]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_run_supplies_its_config_and_tokenizer(tmp_path):
    tokenizer, config = ByteTokenizer(), cases.small_config("gs://bucket/corpus")
    (tmp_path / "run").mkdir()
    tokenizer.save(tmp_path / "run" / "tokenizer.json")
    with bucket(tmp_path):
        Saved(config, tokenizer.hash, "").write(epath.Path("gs://bucket/run"))
        tiny = str(config_folder() / "tiny.py")
        command = parse(["train.py", "--workdir=gs://bucket/run", "--config.run.steps=99"], tiny)
        assert (command.workdir, command.config.run.steps) == ("gs://bucket/run", 99)
        assert command.config.model == config.model and command.config.data == config.data
        saved = Saved.read(epath.Path("gs://bucket/run"))
        assert read_tokenizer(epath.Path("gs://bucket/run"), saved).kind == "bytes"
        with pytest.raises(FileNotFoundError, match="gs://bucket/none: no such folder"):
            Saved.read(epath.Path("gs://bucket/none"))
