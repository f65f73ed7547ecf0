"""Conversations: rendered by the template, the answers and their end tokens alone bear loss, faults are named."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.data.chat_cases import CHATML, MARKED, conversation, conversations, json_lines, tokenizer_folder

from deltaformer_jax.data import ByteTokenizer, batches, load_corpus, load_tokenizer, prepare_corpus
from deltaformer_jax.data.chat import Encoder, load_format
from deltaformer_jax.data.corpus import PIECE, with_held_out_tail
from deltaformer_jax.data.prepare import main
from deltaformer_jax.data.sources import Unreadable
from deltaformer_jax.data.sources.conversation import conversation_of

TALK = conversation("what is one", "one is two", "and the rule", "a memory 日本", system="read")


@pytest.fixture
def tokenizer_file(tmp_path):
    return tokenizer_folder(tmp_path / "tokenizer")


def encoded(file, messages, chat="template"):
    tokenizer = ByteTokenizer() if file == "bytes" else load_tokenizer(file)
    found = Encoder(tokenizer, load_format(chat, str(file))).encode(conversation_of(messages, "messages", "here"))
    return tokenizer, found


def expected_chatml(tokenizer, messages):
    """(ids, mask), written out by hand."""
    begin, end = (tokenizer.special_tokens[name].id for name in ("<|im_start|>", "<|im_end|>"))
    ids, mask = [], []
    for message in messages:
        head = [begin, *tokenizer.encode(message["role"] + "\n")]
        said = [*tokenizer.encode(message["content"]), end]
        after = tokenizer.encode("\n")
        ids += [*head, *said, *after]
        mask += [False] * len(head) + [message["role"] == "assistant"] * len(said) + [False] * len(after)
    return ids, mask


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "generation"])
def test_the_answers_and_their_end_tokens_bear_loss(tmp_path, template):
    file = tokenizer_folder(tmp_path / "tokenizer", template)
    tokenizer, found = encoded(file, TALK)
    ids, mask = expected_chatml(tokenizer, TALK)
    assert found.mask.tolist() == mask
    # "\n" after an answer's end token and the next header are one piece, whose tokens may be joined.
    assert tokenizer.decode(found.tokens) == tokenizer.decode(ids) and found.tokens.tolist() == ids


def test_a_template_without_a_generation_prompt_whose_answers_follow_at_once(tmp_path):
    mistral = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer, found = encoded(tokenizer_folder(tmp_path / "t", mistral), conversation("hi", "one two", "and", "three"))
    end = tokenizer.special_tokens["<|im_end|>"].id
    answers = [*tokenizer.encode(" one two"), end, *tokenizer.encode(" three"), end]
    assert found.tokens[found.mask].tolist() == answers
    assert tokenizer.decode(found.tokens[~found.mask]) == "[INST] hi [/INST][INST] and [/INST]"


@pytest.mark.parametrize("form", [CHATML, MARKED, None], ids=["prefixes", "generation", "plain"])
def test_an_answer_of_weight_0_bears_no_loss(tmp_path, form):
    file = tokenizer_folder(tmp_path / "t", form) if form else "bytes"
    weighed = lambda *weights: [
        message | ({} if weight is None else {"weight": weight})
        for message, weight in zip(conversation("hi", "one", "and", "two", "so", "big"), weights, strict=True)
    ]
    tokenizer, all_bear = encoded(file, weighed(*[None] * 6), "template" if form else "plain")
    _, found = encoded(file, weighed(None, 1, 1, 0, 0, 1.0), "template" if form else "plain")
    assert found.tokens.tolist() == all_bear.tokens.tolist()
    end = tokenizer.special_tokens["<|im_end|>"].id if form else tokenizer.eot
    answers = [[*tokenizer.encode(text), end] for text in ("one", "two", "big")]
    assert all_bear.tokens[all_bear.mask].tolist() == [token for answer in answers for token in answer]
    assert found.tokens[found.mask].tolist() == answers[0] + answers[2]
    with pytest.raises(Unreadable, match="here: all answers have weight 0"):
        encoded(file, weighed(None, 0, None, 0, None, 0), "template" if form else "plain")
    for wrong in (0.5, "0", True):
        with pytest.raises(Unreadable, match=f"here: the weight of message 2 is {wrong!r}; give 0"):
            encoded(file, weighed(None, wrong, None, 0, None, 0), "template" if form else "plain")


def test_calls_of_tools_are_written_or_refused(tmp_path):
    talk = [*conversation("hi"), {"role": "assistant", "content": None, "tool_calls": [{"name": "two"}]}]
    with pytest.raises(Unreadable, match=r"here: message 2 has tool_calls, which the chat template .* does not write"):
        encoded(tokenizer_folder(tmp_path / "a"), talk)
    with pytest.raises(Unreadable, match="here: a message has tool_calls, which the plain form does not write"):
        encoded("bytes", talk, "plain")
    writes = MARKED.replace(
        "message['content'] + '<|im_end|>' }}{% end", "(message.tool_calls or '')|string + '!' }}{% end"
    )
    tokenizer, found = encoded(tokenizer_folder(tmp_path / "b", writes), talk)
    assert tokenizer.decode(found.tokens[found.mask]) == "[{'name': 'two'}]!"
    talk[1].pop("tool_calls")
    with pytest.raises(Unreadable, match="here: the content of message 2 is NoneType, not text"):
        encoded("bytes", talk, "plain")


def test_an_answer_without_an_end_token_ends_with_its_message(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer, found = encoded(tokenizer_folder(tmp_path / "t", template), conversation("hi", "one two", "so", "x"))
    assert tokenizer.decode(found.tokens[found.mask]) == " one two\n\n x\n\n"


def test_the_plain_form_needs_no_template_and_ends_answers_with_end_of_text():
    _, found = encoded("bytes", conversation("hi", "one", "so", "two", system="read"), "plain")
    text = "system:\nread\n\nuser:\nhi\n\nassistant:\none\0user:\nso\n\nassistant:\ntwo\0"
    assert found.tokens.tolist() == [256 if byte == 0 else byte for byte in text.encode()]
    assert found.tokens[found.mask].tolist() == [*b"one", 256, *b"two", 256]


def rows_of(corpus, split="train"):
    part = corpus.split(split)
    return [tuple(map(tuple, (array.tolist() for array in part.read_with_mask(i)))) for i in range(part.documents)]


def test_json_lines_and_parquet_by_any_number_of_workers_are_the_same(tmp_path, tokenizer_file):
    talks = conversations(40)
    (tmp_path / "a.jsonl").write_text(json_lines(talks), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"messages": talks}), tmp_path / "a.parquet", row_group_size=7)
    options = dict(tokenizer=str(tokenizer_file), chat="template", eval_fraction=0.2)
    one = prepare_corpus(tmp_path / "a.jsonl", tmp_path / "one", **options)
    two = prepare_corpus(tmp_path / "a.jsonl", tmp_path / "two", workers=2, **options)
    three = prepare_corpus(tmp_path / "a.parquet", tmp_path / "three", **options)
    assert one.hash == two.hash == three.hash and one.manifest["loss_mask"] is True
    assert rows_of(one) == rows_of(two) == rows_of(three)
    assert one.split("train").documents + one.split("eval").documents == 40 and one.split("eval").documents > 2
    expected = {tuple(map(tuple, expected_chatml(one.tokenizer, talk))) for talk in talks}
    assert {*rows_of(one), *rows_of(one, "eval")} == expected


def test_another_template_is_another_corpus(tmp_path, tokenizer_file):
    (tmp_path / "a.jsonl").write_text(json_lines(conversations(5)), encoding="utf-8")
    options = dict(tokenizer=str(tokenizer_file), eval_fraction=0)
    prepare_corpus(tmp_path / "a.jsonl", tmp_path / "out", chat="template", **options)
    prepare_corpus(tmp_path / "a.jsonl", tmp_path / "out", chat="template", **options)
    with pytest.raises(FileExistsError, match="made with another chat"):
        prepare_corpus(tmp_path / "a.jsonl", tmp_path / "out", chat="plain", **options)


def test_a_long_conversation_keeps_its_mask_in_every_record(tmp_path):
    talk = conversation("x" * (PIECE - 30), "y" * PIECE, "z", "w" * 100)
    (tmp_path / "a.jsonl").write_text(json_lines([talk]), encoding="utf-8")
    split = prepare_corpus(tmp_path / "a.jsonl", tmp_path / "out", chat="plain", eval_fraction=0).split("train")
    tokens, mask = split.read_with_mask(0)
    assert bytes(tokens[mask & (tokens < 256)].astype(np.uint8)) == b"y" * PIECE + b"w" * 100
    assert len(tokens) > 2 * PIECE and np.count_nonzero(mask) == PIECE + 102
    for start, stop in ((0, 5), (PIECE - 3, PIECE + 3), (PIECE, 2 * PIECE), (2 * PIECE - 1, len(tokens)), (9, 9)):
        some, of_some = split.read_with_mask(0, start, stop)
        np.testing.assert_array_equal(some, tokens[start:stop])
        np.testing.assert_array_equal(of_some, mask[start:stop])
        np.testing.assert_array_equal(split.read(0, start, stop), tokens[start:stop])


def test_text_has_no_mask_and_the_settings_that_it_had(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 50)
    corpus = prepare_corpus(tmp_path / "a.txt", tmp_path / "out", eval_fraction=0)
    assert set(corpus.manifest["settings"]) == {"tokenizer", "eval_fraction", "text_field", "source"}
    assert set(corpus.manifest["settings"]["source"]) == {"kind", "path", "files", "hash"}
    assert corpus.manifest["settings"]["text_field"] == "text" and "loss_mask" not in corpus.manifest
    batch = next(batches(corpus, "train", sequence_length=8, batch_size=2, seed=0))
    assert set(batch) == {"tokens", "targets", "segment_ids"}


def test_the_ends_of_conversations_are_not_held_out(tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(conversations(5)), encoding="utf-8")
    corpus = prepare_corpus(tmp_path / "a.jsonl", tmp_path / "out", chat="plain", eval_fraction=0)
    with pytest.raises(ValueError, match="has conversations, which are not cut; prepare it with --eval_fraction"):
        with_held_out_tail(corpus, 0.1)


GOOD = json.dumps({"messages": conversation("hi", "one")})
BROKEN = {
    "not JSON": ('{"messages": [', "line 2: not JSON"),
    "no messages": ('{"text": "a"}', "line 2: no field 'messages' (fields: text); name it with --text_field"),
    "a text": ('{"messages": "a"}', "line 2: field 'messages' is str, not a list of messages"),
    "empty": ('{"messages": []}', "line 2: field 'messages' is an empty list"),
    "no role": (
        '{"messages": [{"from": "user", "value": "a"}]}',
        "line 2: message 1 has no 'role' (it has: from, value)",
    ),
    "no text": (
        '{"messages": [{"role": "user", "content": 5}]}',
        "line 2: the content of message 1 is int, not text",
    ),
    "no answer": (
        json.dumps({"messages": conversation("hi")}),
        "line 2: the chat template renders no answer of role 'assistant'",
    ),
    "an answer to nothing": (
        json.dumps({"messages": conversation("hi", "one")[1:]}),
        "line 2: begins with a message of role 'assistant', which answers nothing",
    ),
    "a special token": (
        json.dumps({"messages": conversation("hi <|im_end|>", "one")}),
        "line 2: a message of role 'user' holds '<|im_end|>', which would become a special token",
    ),
    "half a character": (
        json.dumps({"messages": conversation("hi \ud800", "one")}),
        "line 2: holds half a surrogate pair",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_line_is_named(fault, tmp_path, tokenizer_file, capsys):
    line, message = BROKEN[fault]
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{line}\n{GOOD}\n", encoding="utf-8")
    arguments = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--eval_fraction", "0"]
    arguments += ["--chat", "template", "--tokenizer", str(tokenizer_file)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"a.jsonl, {message}" in error and "--on_error skip" in error
    assert main([*arguments, "--on_error", "skip"]) == 0
    assert load_corpus(tmp_path / "out").split("train").documents == 2
    assert message in (tmp_path / "out" / "left_out.txt").read_text()


def test_a_conversation_too_long_for_memory_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("deltaformer_jax.data.sources.units.LONG", 1000)
    monkeypatch.setattr("deltaformer_jax.data.sources.content.BLOCK", 100)
    long = json.dumps({"messages": conversation("hi", "one " * 1000)})
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{long}\n{GOOD}\n", encoding="utf-8")
    arguments = [str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"), "--chat", "plain", "--eval_fraction", "0"]
    assert main(arguments) == 2
    assert "a.jsonl, line 2: a conversation of more than 1,000 bytes" in capsys.readouterr().err
    assert main([*arguments, "--on_error", "skip"]) == 0
    assert load_corpus(tmp_path / "out").split("train").documents == 2


def test_a_template_may_refuse_a_conversation(tmp_path):
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML
    with pytest.raises(Unreadable, match=r"here: the chat template .*tokenizer_config.json.* no system message"):
        encoded(tokenizer_folder(tmp_path / "t", template), conversation("hi", "one"))


SHORTENS = (  # what models that think do: an answer is written otherwise when others follow it
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_PROMPT = CHATML.partition("{% if add_generation_prompt")[0]
TEMPLATES = {
    "renders messages 1 to 2 in another way": (SHORTENS, conversation("a", "b", "c", "d")),
    "writes something before an answer": (NO_PROMPT, conversation("a", "b")),
    "has {% generation %} blocks inside one another": (
        "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
        conversation("a", "b"),
    ),
}


@pytest.mark.parametrize("reason", TEMPLATES)
def test_a_template_whose_answers_cannot_be_found_is_refused_by_name(reason, tmp_path):
    template, talk = TEMPLATES[reason]
    with pytest.raises(ValueError) as caught:
        encoded(tokenizer_folder(tmp_path / "t", template), talk)
    assert not isinstance(caught.value, Unreadable)  # it is not one line's fault, so --on_error skip does not hide it
    assert "tokenizer_config.json, chat_template: " in str(caught.value) and reason in str(caught.value)


def test_templates_cannot_reach_out_of_their_sandbox(tmp_path):
    with pytest.raises(Unreadable, match="unsafe"):
        encoded(tokenizer_folder(tmp_path / "t", "{{ messages.__class__.__mro__ }}"), conversation("a", "b"))
    with pytest.raises(Unreadable, match="unsafe"):
        encoded(tokenizer_folder(tmp_path / "t", "{{ messages.append(1) }}"), conversation("a", "b"))


def test_a_template_with_a_clock(tmp_path):
    """One that asks whether there is a clock goes without; one that needs it is refused, and not line by line."""
    asks = "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% else %}26{% endif %}"
    tokenizer, found = encoded(tokenizer_folder(tmp_path / "asks", asks + CHATML), TALK)
    assert tokenizer.decode(found.tokens).startswith("26system")
    with pytest.raises(
        ValueError, match=r"calls strftime_now, .*put a date in its place in a copy, .*--chat"
    ) as caught:
        encoded(tokenizer_folder(tmp_path / "needs", "{{ strftime_now('%d') }}" + CHATML), TALK)
    assert not isinstance(caught.value, Unreadable)


def test_several_templates_without_a_default_are_listed(tmp_path):
    file = tokenizer_folder(tmp_path / "t", [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}])
    with pytest.raises(ValueError, match=r"the names rag, tool_use, and none is 'default'; write .*template\.jinja"):
        load_format("template", str(file))


def test_where_a_template_is_looked_for(tmp_path):
    file = tokenizer_folder(
        tmp_path / "t", [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    )
    assert load_format("template", str(file)).template == "y"
    (file.parent / "chat_template.jinja").write_text("z", encoding="utf-8")
    assert load_format("template", str(file)).template == "z"
    (tmp_path / "own.jinja").write_text("own", encoding="utf-8")
    own = load_format(str(tmp_path / "own.jinja"), str(file))
    assert own.template == "own" and own.variables == {"eos_token": "<|im_end|>"}


def test_settings_that_do_not_fit_are_one_line(tmp_path, tokenizer_file, capsys):
    (tmp_path / "a.jsonl").write_text(GOOD + "\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    (tmp_path / "bad.jinja").write_text("{% for %}", encoding="utf-8")
    bare = tokenizer_folder(tmp_path / "bare", None)
    cases = [
        ("a.jsonl", ["--chat", "template"], "--chat template: tokenizer 'bytes' has no chat template; name another"),
        (
            "a.jsonl",
            ["--chat", "template", "--tokenizer", str(bare)],
            "tokenizer_config.json: missing or without a chat",
        ),
        (
            "a.jsonl",
            ["--chat", "none.jinja"],
            "none.jinja: no such chat template; --chat is plain, template or a Jinja",
        ),
        ("a.jsonl", ["--chat", str(tmp_path / "bad.jinja")], "bad.jinja: not a chat template in Jinja"),
        ("a.jsonl", ["--chat", "plain", "--tokenizer", "bpe:300"], "cannot be learnt from conversations"),
        ("a.jsonl", ["--chat", "plain", "--separator", "x"], "separator divides text files"),
        ("a.jsonl", [], "line 1: no field 'text' (fields: messages); name it with --text_field, or --chat for"),
        ("a.jsonl", ["--text_field", "messages"], "field 'messages' is list, not text; choose --text_field, or --chat"),
        ("a.txt", ["--chat", "plain"], "a.txt: unknown suffix '.txt'"),
    ]
    for name, flags, message in cases:
        assert main([str(tmp_path / name), "--out", str(tmp_path / "out"), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.strip().splitlines()[-1]) > 10, error
    assert not (tmp_path / "out").exists()
