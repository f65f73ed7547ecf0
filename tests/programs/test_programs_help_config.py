"""Every setting is explained, in docs/configuration.md and by train.py --help_config, from its definition."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from deltaformer_jax import help_config
from deltaformer_jax import train as train_program
from deltaformer_jax.config import Config
from deltaformer_jax.config.fields import meaning_of

ROOT = Path(__file__).parents[2]
FIELDS = [
    (f"{section.name}.{field.name}", field)
    for section in dataclasses.fields(Config)
    for field in dataclasses.fields(section.default_factory)
]


def shown(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train_program.main()
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "field"), FIELDS, ids=[name for name, _ in FIELDS])
def test_every_field_has_a_meaning_in_sentences(name, field):
    meaning = meaning_of(field)
    assert len(meaning) > 10 and meaning.endswith(".") and meaning[0].isupper()


def test_the_page_is_what_the_definitions_say():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == help_config.page(), "python -m deltaformer_jax.help_config > docs/configuration.md"


def test_all_settings(capsys, monkeypatch):
    text = shown(capsys, monkeypatch, "--help_config")
    assert all(f"--config.{name} = " in text for name, _ in FIELDS)
    assert max(map(len, text.splitlines())) <= 130


@pytest.mark.parametrize("arguments", [("--help_config", "RoPE"), ("--help_config=rope",)])
def test_the_settings_about_a_word(capsys, monkeypatch, arguments):
    text = shown(capsys, monkeypatch, *arguments)
    found = re.findall(r"--config\.(\S+) =", text)
    assert found == ["model.rope_base", "model.rope_scaling", "model.write_rope_base"]
    assert text.startswith("--config.model.rope_base = 10000.0")
    assert "Mixers: delta_former, softmax_attention, retention." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--help_config", "windw"), "no setting's name or meaning contains 'windw'; did you mean window?"),
        (("--help_config", "window", "more"), "at most one word"),
        (("--workdir=x", "--help_config"), "at most one word after it and nothing else"),
        (("--help_confg",), "did you mean --help_config?"),
    ],
)
def test_what_cannot_be_asked(capsys, monkeypatch, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        shown(capsys, monkeypatch, *arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
