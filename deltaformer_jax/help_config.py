"""Every setting explained from its definition: what train.py --help_config prints and docs/configuration.md holds.

python -m deltaformer_jax.help_config > docs/configuration.md
"""

import dataclasses
import textwrap
from typing import NamedTuple

from deltaformer_jax.config import Config
from deltaformer_jax.config.fields import meaning_of, rule_of
from deltaformer_jax.host.spelling import did_you_mean


class Setting(NamedTuple):
    name: str  # section.field
    type: str
    default: str
    allowed: str  # "": any value of the type
    meaning: str
    mixers: str  # those that take it; "": the setting is not a mixer's


def settings() -> list[Setting]:
    """All settings in the order of their definition."""
    from deltaformer_jax.layers.mixers import MIXERS  # imports jax
    from deltaformer_jax.layers.mixers.build import mixer_fields

    takes = {mixer: set(mixer_fields(mixer)) for mixer in MIXERS}
    found = []
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default_factory):
            users = [mixer for mixer in MIXERS if section.name == "model" and field.name in takes[mixer]]
            others = [mixer for mixer in MIXERS if mixer not in users]
            mixers = ", ".join(users)
            if len(others) <= 1 < len(users):
                mixers = f"all but {others[0]}" if others else "all"
            found.append(
                Setting(
                    f"{section.name}.{field.name}",
                    field.type.__name__,
                    f'"{field.default}"' if isinstance(field.default, str) else str(field.default),
                    rule_of(field).allowed(),
                    meaning_of(field),
                    mixers,
                )
            )
    return found


def about(word: str | None) -> str:
    """The settings whose name or meaning contains `word` (None: all), for a terminal. Raises ValueError for none."""
    everything = settings()
    chosen = [
        setting for setting in everything if word is None or word.lower() in f"{setting.name} {setting.meaning}".lower()
    ]
    if not chosen:
        fields = [setting.name.partition(".")[2] for setting in everything]
        raise ValueError(f"--help_config: no setting's name or meaning contains {word!r}{did_you_mean(word, fields)}")
    return "\n\n".join(_entry(setting) for setting in chosen)


def _entry(setting: Setting) -> str:
    values = f", {setting.allowed}" if setting.allowed else ""
    lines = [f"--config.{setting.name} = {setting.default}   ({setting.type}{values})"]
    lines += textwrap.wrap(setting.meaning, 116)
    if setting.mixers:
        lines += textwrap.wrap(f"Mixers: {setting.mixers}.", 116)
    return "\n    ".join(lines)


def page() -> str:
    """docs/configuration.md."""
    head = """# Every setting

Each is a field of a section of `Config` in a [config file](your_own_config.md), and a flag of `train.py`:
`--config.section.field=value`. `python train.py --help_config [WORD]` prints the same. This page is made by `python -m
deltaformer_jax.help_config > docs/configuration.md`.

"Mixers" are those that take the field. If no mixer of the model takes a field that is not at its default, the run is
refused or, for fields that only tune or size a mixer (`chunk_size`, `conv_size`, `value_dim`, ...), says so.
`Mixer("softmax_attention", window=128)` in `model.mixers` sets a mixer's field for one layer of the pattern.
"""
    parts, everything = [head], settings()
    for section in dataclasses.fields(Config):
        parts.append(f"## {section.name}\n\n{section.default_factory.__doc__.strip().splitlines()[0]}\n")
        with_mixers = section.name == "model"
        parts.append("| field | type | default | values | meaning |" + (" mixers |" if with_mixers else ""))
        parts.append("| --- | --- | --- | --- | --- |" + (" --- |" if with_mixers else ""))
        for setting in everything:
            if setting.name.startswith(f"{section.name}."):
                cells = [f"`{setting.name.partition('.')[2]}`", setting.type, f"`{setting.default}`", *setting[3:5]]
                cells += [setting.mixers] if with_mixers else []
                parts.append(f"| {' | '.join(cells)} |".replace("**", r"\*\*"))
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
