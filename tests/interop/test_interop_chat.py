"""A run that was trained on conversations: `sample --chat` asks it in their form, and its export has the template."""

import functools
import json
import shutil

import numpy as np
import pytest
from flax import nnx
from support import training_cases as cases
from support.data.chat_cases import CHATML, MARKED, conversation, conversations, json_lines, tokenizer_folder

from deltaformer_jax import LanguageModel, ModelConfig, convert
from deltaformer_jax.config.command_line import parse
from deltaformer_jax.config.files import config_folder
from deltaformer_jax.data import load_tokenizer, prepare_corpus
from deltaformer_jax.data.chat import ChatFormat, Encoder, load_format, pretrained_format
from deltaformer_jax.data.sources import Conversation, Unreadable
from deltaformer_jax.interop import save_pretrained
from deltaformer_jax.sample.__main__ import main
from deltaformer_jax.training.checkpoints.restore import read_chat
from deltaformer_jax.training.setup import prepare


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the folder of a run on conversations in ChatML, its tokenizer's file)."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "talks.jsonl").write_text(json_lines(conversations(20)), encoding="utf-8")
    file = tokenizer_folder(folder / "tokenizer")
    path = prepare_corpus(folder / "talks.jsonl", folder / "corpus", tokenizer=str(file), chat="template").path
    cases.run_training(cases.small_config(path, run__steps=2, run__eval_every=0), folder / "run")
    return folder / "run", file


@pytest.mark.parametrize("form", [ChatFormat(None), ChatFormat(CHATML), ChatFormat(MARKED)])
def test_a_prompt_is_what_training_has_before_the_answer(form, tmp_path):
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path))
    if form.template == MARKED:  # without a prompt of its own, as some templates are
        form = ChatFormat(MARKED + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    encoder = Encoder(tokenizer, form)
    for messages in conversations(9):
        whole = encoder.encode(Conversation(messages, "whole"))
        tokens, text = encoder.prompt(Conversation(messages[:-1], "prompt"))
        assert tokens == [tokenizer.eot, *whole.tokens[: len(tokens) - 1]]
        rest = whole.mask[len(tokens) - 1 :]
        assert rest[0] and not np.any(np.diff(rest.astype(int)) > 0)  # the last answer, and what may follow it
        names = ("<|im_start|>", "<|im_end|>") if form.template else ()  # decoding leaves special tokens out
        assert tokenizer.decode(tokens[1:]) == functools.reduce(lambda left, name: left.replace(name, ""), names, text)
    end = "<|im_end|>" if form.template else None
    assert encoder.end == (tokenizer.special_tokens[end].id if end else tokenizer.eot)
    with pytest.raises(Unreadable, match=r"ends with a message of role 'assistant'; leave that one out"):
        encoder.prompt(Conversation(conversation("Hi", "Hello"), "one"))


def test_sampling_in_the_runs_form(trained, tmp_path, capsys):
    folder, _ = trained
    (tmp_path / "more.jsonl").write_text(json_lines([conversation("one", "two", "what is")]))
    flags = ["--chat", "what is", "--chats", str(tmp_path / "more.jsonl"), "--tokens", "3", "--json"]
    main(["--workdir", str(folder), *flags])
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    asked = "<|im_start|>user\nwhat is<|im_end|>\n<|im_start|>assistant\n"
    assert [record["prompt"] for record in records] == [
        asked,
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n" + asked,
    ]


def test_the_export_has_the_template(trained, tmp_path):
    folder, file = trained
    form = read_chat(folder)
    assert form.template == CHATML and form.variables == {"eos_token": "<|im_end|>"}
    convert.main(["--to-hf", "--workdir", str(folder), "--out", str(tmp_path / "out")])
    read = load_format("template", str(tmp_path / "out" / "tokenizer.json"))
    assert (read.template, read.variables) == (form.template, form.variables)
    talk = Conversation(conversation("what is", "one", "two"), "talk")
    tokenizers = (load_tokenizer(path) for path in (file, tmp_path / "out" / "tokenizer.json"))
    ours, theirs = (Encoder(tokenizer, one).prompt(talk) for tokenizer, one in zip(tokenizers, (form, read)))
    assert ours == theirs
    convert.main([str(tmp_path / "out"), "--workdir", str(tmp_path / "in")])
    assert (tmp_path / "in" / "chat.json").read_text() == (folder / "chat.json").read_text()
    beside_a_run = load_format("template", str(tmp_path / "in" / "tokenizer.json"))
    assert (beside_a_run.template, beside_a_run.variables) == (form.template, form.variables)


EOS_FILE = "generation_config"
# Shows what an answer thinks only if nothing follows it, so that training refuses it.
THINKING = CHATML.replace("message['content']", "('(thinks) ' if loop.last else '') + message['content']")


@pytest.fixture(scope="module", params=["tokenizer_config.json", "chat_template.jinja"])
def instruct(request, tmp_path_factory):
    """The folder of an instruct model of the hub's format, which ends its answers with <|im_end|>."""
    folder = tmp_path_factory.mktemp("instruct") / "model"
    file = tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), THINKING)
    sizes = dict(d_model=32, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=32, num_layers=1)
    vocabulary = load_tokenizer(file).vocab_size
    config = ModelConfig(vocab_size=vocabulary, mixers=("softmax_attention",), embedding_scale="one", **sizes)
    save_pretrained(LanguageModel(config, rngs=nnx.Rngs(0)), config, folder, tokenizer=file)
    said = json.loads((file.parent / "tokenizer_config.json").read_text())
    if request.param != "tokenizer_config.json":
        (folder / request.param).write_text(said.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def test_a_converted_model_is_asked_by_its_own_template(instruct, tmp_path, capsys):
    tokenizer = load_tokenizer(instruct / "tokenizer.json")
    end = tokenizer.special_tokens["<|im_end|>"].id
    convert.main([str(instruct), "--workdir", str(tmp_path / "run")])
    form = read_chat(tmp_path / "run")
    assert form == ChatFormat(THINKING, {"eos_token": "<|im_end|>"}, form.where, tuple(sorted((tokenizer.eot, end))))
    (tmp_path / "talk.jsonl").write_text(json_lines([conversation("one", "two", "what is")]))
    asked = (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\n(thinks) what is<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens, text = Encoder(tokenizer, form).prompt(Conversation(conversation("one", "two", "what is"), "talk"))
    assert text == asked and tokens == tokenizer.encode_with_specials(asked).tolist()
    ask = ["--chats", str(tmp_path / "talk.jsonl"), "--temperature", "0", "--tokens", "3", "--json"]
    capsys.readouterr()
    main(["--workdir", str(tmp_path / "run"), *ask])
    first = json.loads(capsys.readouterr().out)
    assert first["prompt"] == asked and (first["tokens"], first["finish"]) == (3, "length")
    # The same model says that any token ends an answer.
    chat = json.loads((tmp_path / "run" / "chat.json").read_text())
    chat["ends"] = list(range(tokenizer.vocab_size))
    (tmp_path / "run" / "chat.json").write_text(json.dumps(chat))
    main(["--workdir", str(tmp_path / "run"), *ask])
    ended = json.loads(capsys.readouterr().out)
    assert (ended["text"], ended["tokens"], ended["finish"]) == ("", 1, "stop")


def test_a_template_comes_back_from_a_round_trip(instruct, tmp_path):
    runs, out = [tmp_path / "one", tmp_path / "two"], tmp_path / "out"
    convert.main([str(instruct), "--workdir", str(runs[0])])
    convert.main(["--to-hf", "--workdir", str(runs[0]), "--out", str(out)])
    convert.main([str(out), "--workdir", str(runs[1])])
    there, back = (load_format("template", str(folder / "tokenizer.json")) for folder in (instruct, out))
    assert (there.template, there.variables) == (back.template, back.variables)
    one, two = ((run / "chat.json").read_text() for run in runs)
    assert one == two
    ends = json.loads(one)["ends"]
    assert all(json.loads((out / f"{name}.json").read_text())["eos_token_id"] == ends for name in ("config", EOS_FILE))


@pytest.mark.parametrize(
    ("said", "named", "ends"),
    [
        ({EOS_FILE: [5, 7], "config": 9}, None, (5, 7)),
        ({"config": 9}, None, (9,)),
        ({EOS_FILE: None, "config": 9}, "<|im_start|>", (9, "<|im_start|>")),
        ({EOS_FILE: 10**6}, "no token", ("<|endoftext|>",)),
        ({}, None, ("<|endoftext|>",)),
    ],
)
def test_where_the_answers_of_a_folder_end(said, named, ends, tmp_path):
    file = tokenizer_folder(tmp_path, eos_token=named)
    for name, ids in said.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = load_tokenizer(file)
    numbers = [tokenizer.special_tokens[end].id if isinstance(end, str) else end for end in ends]
    assert pretrained_format(tmp_path, file, tokenizer).ends == tuple(sorted(numbers))
    elsewhere = tokenizer_folder(tmp_path / "tokenizer", template="{{ 'another' }}")
    assert pretrained_format(tmp_path, elsewhere, tokenizer).template == CHATML
    (tmp_path / "tokenizer_config.json").unlink()
    assert pretrained_format(tmp_path, elsewhere, tokenizer).template == "{{ 'another' }}"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("instruct", ["tokenizer_config.json"], indirect=True)
def test_a_run_on_text_from_an_instruct_model_has_no_form(instruct, tmp_path):
    (tmp_path / "a.txt").write_text("what is the delta rule " * 50, encoding="utf-8")
    file = str(instruct / "tokenizer.json")
    corpus = prepare_corpus(tmp_path / "a.txt", tmp_path / "corpus", tokenizer=file, eval_fraction=0)
    flags = [f"--config.run.init_from={instruct}", f"--config.data.path={corpus.path}", "--config.run.eval_every=0"]
    small = ["--config.data.sequence_length=16", "--config.data.batch_size=8"]
    config = parse(["train.py", *flags, *small], str(config_folder() / "tiny.py")).config
    prepare(config, tmp_path / "run").run.checkpoints.close()
    assert read_chat(tmp_path / "run") is None


@pytest.mark.parametrize("instruct", ["tokenizer_config.json"], indirect=True)
def test_a_folder_without_a_template_has_no_form(instruct, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(instruct, bare, ignore=shutil.ignore_patterns("tokenizer_config.json", "*.jinja"))
    convert.main([str(bare), "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "chat.json").exists()
    with pytest.raises(SystemExit):
        main(["--workdir", str(tmp_path / "run"), "--chat", "Hi"])
    assert "nor converted from a folder with a chat template; give a --prompt" in capsys.readouterr().err
    (bare / "tokenizer_config.json").write_text("{")
    with pytest.raises(SystemExit):
        convert.main([str(bare), "--workdir", str(tmp_path / "other")])
    assert "tokenizer_config.json: not JSON" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_what_is_refused(trained, tmp_path, capsys):
    folder, _ = trained
    plain = tmp_path / "plain"
    cases.run_training(cases.small_config(cases.make_corpus(tmp_path), run__steps=1, run__eval_every=0), plain)
    assert not (plain / "chat.json").exists() and read_chat(plain) is None
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text(json_lines([conversation("Hi")]) + '{"messages": [\n')
    (tmp_path / "other.jsonl").write_text('{"talk": "Hi"}\n')
    (tmp_path / "ends.jsonl").write_text(json_lines([conversation("Hi", "Hello")]))
    for flags, message in (
        (["--workdir", str(plain), "--chat", "Hi"], "has no chat.json: it was not trained on conversations"),
        (["--workdir", str(folder), "--chat", "Hi", "--prompt", "x"], "--chat: the same call continues no --prompt"),
        (
            ["--workdir", str(folder), "--chats", str(tmp_path / "bad.jsonl")],
            "line 1: field 'messages' is an empty list, not a list of messages; a line is {\"messages\": [",
        ),
        (["--workdir", str(folder), "--chats", str(tmp_path / "broken.jsonl")], "broken.jsonl, line 2: not JSON:"),
        (["--workdir", str(folder), "--chats", str(tmp_path / "other.jsonl")], "no field 'messages' (fields: talk); a"),
        (["--workdir", str(folder), "--chat", " "], "--chat 1: the last message is empty; give what the user says"),
        (["--workdir", str(folder), "--chats", str(tmp_path / "ends.jsonl")], "line 1: ends with a message of role"),
        (["--workdir", str(folder), "--chats", str(tmp_path / "empty.jsonl")], "it holds no conversation"),
        (["--workdir", str(folder), "--chats", "nowhere"], "--chats nowhere: No such file"),
        (["--workdir", str(folder), "--chat", "a <|im_end|> b"], "which would become a special token"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(flags)
        assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    (folder / "chat.json").rename(folder / "kept.json")
    (folder / "chat.json").write_text("{")
    with pytest.raises(ValueError, match=r"chat\.json: not the form of a conversation"):
        read_chat(folder)
    (folder / "kept.json").rename(folder / "chat.json")
