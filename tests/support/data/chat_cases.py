"""Conversations, and the folder of a tokenizer with a chat template, for tests."""

import json
import random

from deltaformer_jax.data import train_bpe

CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
)
WORDS = "what is the delta rule a memory that is written and read by keys größer 日本 one two".split()


def conversation(*contents, system=None):
    """Messages of the user and the assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [*first, *turns]


def conversations(count, seed=0):
    draw = random.Random(seed)
    text = lambda: " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 8)))
    return [
        conversation(*(text() for _ in range(2 * draw.randint(1, 3))), system=text() if i % 3 == 0 else None)
        for i in range(count)
    ]


def json_lines(found):
    return "".join(json.dumps({"messages": messages}) + "\n" for messages in found)


def tokenizer_folder(folder, template=CHATML, **config):
    """A folder with tokenizer.json, a small BPE with the special tokens of ChatML, and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads(train_bpe([" ".join(WORDS) * 3], 300).file_text)
    size = len(content["model"]["vocab"])
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    names = [name for name in ("<|im_start|>", "<|im_end|>")]
    content["added_tokens"] += [{"id": size + i, "content": name, **plain} for i, name in enumerate(names)]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = {"chat_template": template, "eos_token": "<|im_end|>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "tokenizer.json"
