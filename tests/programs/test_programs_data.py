"""From text to a trained model: the recipe of configs/deltaformer_340m.py on a small scale; mixtures."""

import json
import random

import jax
import pyarrow
import pyarrow.parquet
import pytest
from support import training_cases as cases

from deltaformer_jax.config.command_line import parse
from deltaformer_jax.config.files import config_folder
from deltaformer_jax.data import load_corpus, prepare_corpus
from deltaformer_jax.data.prepare import main as prepare_main
from deltaformer_jax.evaluate import __main__ as evaluate
from deltaformer_jax.training.setup import load_data, prepare

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    yield from cases.compile_once(tmp_path_factory.mktemp("compiled"))


def fineweb_edu(folder, files=2, documents=60):
    """Parquet files of the data set's columns."""
    draw = random.Random(0)
    words = "the of school water light river energy student history cell number earth".split()
    for i in range(files):
        texts = [" ".join(draw.choices(words, k=draw.randint(5, 60))) + "." for _ in range(documents)]
        table = pyarrow.table(
            {
                "text": texts,
                "id": [f"<urn:uuid:{i}-{j}>" for j in range(documents)],
                "dump": ["CC-MAIN-2024-10"] * documents,
                "url": ["https://example.org"] * documents,
                "language_score": [0.9] * documents,
                "token_count": [len(text) for text in texts],
                "score": [2.6] * documents,
                "int_score": [3] * documents,
            }
        )
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, folder / f"{i:03}_00000.parquet", row_group_size=25, compression="zstd")
    return folder


SMALL = [
    "--config.model.vocab_size=0",
    "--config.model.d_model=32",
    "--config.model.num_layers=2",
    "--config.model.num_heads=2",
    "--config.model.num_kv_heads=2",
    "--config.model.head_dim=16",
    "--config.model.mlp_dim=64",
    "--config.data.sequence_length=32",
    "--config.data.batch_size=8",
    "--config.optimizer.warmup_steps=2",
    "--config.optimizer.decay_steps=8",
    "--config.run.steps=6",
    "--config.run.eval_every=6",
    "--config.run.log_every=1",
    "--config.run.sample_prompt=",
]


@pytest.mark.long
@pytest.mark.parametrize("name", ["deltaformer_340m", "transformer_340m"])
def test_the_recipe_from_parquet_to_bits_per_byte(tmp_path, capsys, name):
    source, out, workdir = fineweb_edu(tmp_path / "parquet"), tmp_path / "data", tmp_path / "run"
    arguments = [str(source), "--out", str(out), "--tokenizer", "bpe:300", "--eval_fraction", "0.1", "--workers", "2"]
    assert prepare_main(arguments) == 0
    assert "vocabulary 300" in capsys.readouterr().out
    assert sum(entry["documents"] for entry in load_corpus(out).manifest["splits"].values()) == 120
    flags = ["train.py", "--config", name, *SMALL, f"--config.data.path={out}"]
    config = parse(flags, str(config_folder() / "tiny.py")).config
    assert config.optimizer.accumulation_steps == 4 and config.optimizer.learning_rate == 2e-3
    cases.run_training(config, workdir)
    losses = [record["loss"] for record in cases.read_metrics(workdir) if "loss" in record]
    assert len(losses) == 6 and losses[-1] < losses[0]
    evaluate.main(["--workdir", str(workdir)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["bits_per_byte"] == pytest.approx(cases.read_metrics(workdir)[-1]["eval_bits_per_byte"], rel=1e-5)


def test_a_stopped_run_on_a_mixture_goes_on_bit_for_bit(tmp_path):
    code, web = cases.make_corpus(tmp_path / "a"), cases.make_corpus(tmp_path / "b", ("alpha", "beta", "gamma"))
    mixture = f"{code}=0.7,{web}=0.3"
    config = cases.small_config(mixture)
    whole = cases.run_training(config, tmp_path / "whole")
    for step in (3, 7):
        cases.run_training(config, tmp_path / "parts", lambda steps, step=step: cases.StopAt(steps, step))
    parts = cases.run_training(config, tmp_path / "parts")
    assert cases.read_metrics(tmp_path / "parts") == cases.read_metrics(tmp_path / "whole")
    cases.assert_same_bits(parts.state, whole.state)

    config.data.path = f"{code}=0.5,{web}=0.5"
    with pytest.raises(ValueError, match=r"its text .* is not that of the run"):
        prepare(config, tmp_path / "parts", devices=jax.devices()[:1])


def test_a_corpus_that_moved_is_the_same(tmp_path):
    corpus = cases.make_corpus(tmp_path / "a")
    config = cases.small_config(corpus, run__steps=4)
    cases.run_training(config, tmp_path / "run")
    corpus.rename(tmp_path / "moved")
    config.data.path, config.run.steps = str(tmp_path / "moved"), 5
    assert cases.run_training(config, tmp_path / "run").step == 5


def test_no_evaluation_documents_is_said_before_training(tmp_path):
    (tmp_path / "one.txt").write_text("a single document " * 50)
    corpus = prepare_corpus(tmp_path / "one.txt", tmp_path / "corpus", eval_fraction=0).path
    config = cases.small_config(corpus)
    with pytest.raises(ValueError, match=r"the eval split of .* has no documents: .*; or set run\.eval_every=0"):
        prepare(config, tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()
    config.run.eval_every, config.run.steps = 0, 2
    assert cases.run_training(config, tmp_path / "run").step == 2


def test_one_document_is_evaluated_on_its_end(tmp_path):
    text = "".join(f"line {i} of a single document\n" for i in range(100))
    (tmp_path / "one.txt").write_text(text)
    corpus = prepare_corpus(tmp_path / "one.txt", tmp_path / "corpus", eval_fraction=0)
    config = cases.small_config(corpus.path, run__steps=2, run__eval_every=2)
    with pytest.raises(ValueError, match=r"or data\.eval_tail=0\.1 to keep the end of each document for evaluation"):
        prepare(config, tmp_path / "run", devices=jax.devices()[:1])
    config.data.eval_tail = 0.1
    held_out = load_data(config)
    tail, head = held_out.split("eval"), held_out.split("train")
    assert held_out.tokenizer.decode(head.read(0)) + held_out.tokenizer.decode(tail.read(0)) == text
    assert tail.tokens == -(-len(text) // 10) == held_out.manifest["splits"]["eval"]["tokens"]
    assert held_out.tokenizer.decode(tail.read(0, 3, 9)) == text[-tail.tokens :][3:9]
    run = cases.run_training(config, tmp_path / "run")
    assert cases.read_metrics(tmp_path / "run")[-1]["eval_bits_per_byte"] > 0 and run.corpus.hash == corpus.hash
    with pytest.raises(ValueError, match=r"other settings: data\.eval_tail: 0\.1 in the run, 0\.2 asked"):
        prepare(cases.small_config(corpus.path, run__steps=3, data__eval_tail=0.2), tmp_path / "run")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{own}", "has evaluation documents of its own"),
        ("task:parity", "for one prepared corpus"),
        ("{own}=1,", "for one prepared corpus"),
    ],
)
def test_an_end_is_not_held_out_where_there_is_something_to_evaluate_on(tmp_path, path, message):
    corpus = cases.make_corpus(tmp_path)
    config = cases.small_config(path.format(own=corpus), data__eval_tail=0.1, data__sequence_length=64)
    with pytest.raises(ValueError, match=rf"^data\.eval_tail = 0\.1: .*{message}.*; leave it at 0"):
        load_data(config)


def test_an_end_of_a_document_of_one_token(tmp_path):
    (tmp_path / "one.txt").write_text("x")
    corpus = prepare_corpus(tmp_path / "one.txt", tmp_path / "corpus", eval_fraction=0).path
    with pytest.raises(ValueError, match=r"documents of 1 tokens at most: too short to be cut"):
        load_data(cases.small_config(corpus, data__eval_tail=0.1))
