"""A run that was trained on conversations: `sample --chat` asks it in their form, and its export has the template."""

import functools
import json

import numpy as np
import pytest
from support import training_cases as cases
from support.data.chat_cases import CHATML, MARKED, conversation, conversations, json_lines, tokenizer_folder

from deltaformer_jax import convert
from deltaformer_jax.data import load_tokenizer, prepare_corpus
from deltaformer_jax.data.chat import ChatFormat, Encoder, load_format
from deltaformer_jax.data.sources import Conversation, Unreadable
from deltaformer_jax.sample.__main__ import main
from deltaformer_jax.training.checkpoints.restore import read_chat


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


def test_what_is_refused(trained, tmp_path, capsys):
    folder, _ = trained
    plain = tmp_path / "plain"
    cases.run_training(cases.small_config(cases.make_corpus(tmp_path), run__steps=1, run__eval_every=0), plain)
    assert not (plain / "chat.json").exists() and read_chat(plain) is None
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    for flags, message in (
        (["--workdir", str(plain), "--chat", "Hi"], "has no chat.json: it was not trained on conversations"),
        (["--workdir", str(folder), "--chat", "Hi", "--prompt", "x"], "--chat: the same call continues no --prompt"),
        (
            ["--workdir", str(folder), "--chats", str(tmp_path / "bad.jsonl")],
            "line 1: field 'messages' is an empty",
        ),
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
