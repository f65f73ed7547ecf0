"""The command line of train.py: parsing, checks, and one-line errors."""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from absl import flags
from etils import epath
from ml_collections import config_flags

from deltaformer_jax.config import Config, saved_config
from deltaformer_jax.config.checks import check
from deltaformer_jax.config.files import find_config
from deltaformer_jax.config.init_from import check_init_from
from deltaformer_jax.config.mixer import with_given
from deltaformer_jax.config.saved import Saved, flatten
from deltaformer_jax.host.arguments import value_of
from deltaformer_jax.host.paths import expand
from deltaformer_jax.host.spelling import did_you_mean, nearest

# Flag -> whether it takes a value, for the flags that are not config fields.
OWN = {
    "config": True,
    "workdir": True,
    "resume": False,
    "dry_run": False,
    "for": True,
    "coordinator": True,
    "processes": True,
    "process": True,
    "wait": True,
}
LISTING = (
    "the flags are --config NAME|FILE, --config.section.field=value, --workdir DIR, --resume, "
    "--dry_run [--for TOPOLOGY], --help_config, and for several processes --coordinator HOST:PORT, --processes N, "
    "--process I, --wait SECONDS"
)


class Command(NamedTuple):
    config: Config
    workdir: str  # "": a new folder under runs/
    name: str  # the config file's name without .py; "resumed" if the config comes from the workdir
    dry_run: bool
    topology: str  # what the dry run compiles for; "": the devices that are there
    resume: bool  # whether a workdir without a run is refused


def parse(argv: list[str], default_config: str) -> Command:
    """Parse the command line `argv` (argv[0] is the program) into a checked Config and the other flags.

    Without --config the config comes from the run in --workdir if there is one, else from the folder in
    --config.run.init_from, and from `default_config` otherwise. With init_from, a field of the model that is given
    holds for every layer that has it, also where an entry of the folder's `mixers` has a value of its own.
    Raises ValueError, OSError or absl's flags.Error with a one-line message.
    """
    _check_flags(argv)
    workdir = value_of("workdir", argv)
    path, label = value_of("config", argv), None
    of_weights = False  # whether the model is that of run.init_from
    if workdir is not None:
        workdir = expand(workdir)
        argv = _with_value("workdir", workdir, argv)
    is_run = workdir and (epath.Path(workdir) / Saved.FILE).exists()
    if init_from := value_of("config.run.init_from", argv):
        init_from = expand(init_from)
        argv = _with_value("config.run.init_from", init_from, argv)
        if not is_run:  # a run that has begun does not read it again
            check_init_from(init_from)
    if path is not None:
        path = find_config(expand(path), Path(default_config).parent)
        argv = _with_value("config", path, argv)
    elif is_run:
        Saved.read(epath.Path(workdir))  # only for its errors, which config_flags would bury in a traceback
        path = f"{saved_config.__file__}:{workdir}"
    elif init_from:
        label = f"run.init_from = {init_from!r}"
        # A path, not an import: reading another project's config needs the model, and so jax.
        path = f"{Path(saved_config.__file__).parents[1] / 'interop' / 'as_config.py'}:{init_from}"
        of_weights = True
    else:
        path = default_config
    # ml_collections loads every config file into the same module, where get_config of an earlier file would remain.
    sys.modules.pop("config_config", None)
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "the run's folder; may be gs://", flag_values=values)
    flags.DEFINE_bool("resume", False, "refuse a --workdir that holds no run", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "print sizes, shapes and memory; allocate nothing", flag_values=values)
    flags.DEFINE_string("for", "", "with --dry_run: devices that are not here, such as h100", flag_values=values)
    # Read before this by processes/place.py, which says what they mean.
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("processes", None, "how many processes make up the run", flag_values=values)
    flags.DEFINE_integer("process", None, "which of them this is, from 0", flag_values=values)
    flags.DEFINE_integer("wait", None, "seconds to wait for all of them", flag_values=values)
    try:
        holder = config_flags.DEFINE_config_file("config", path, flag_values=values, sys_argv=argv)
        rest = values(argv)
        config = holder.value
    except Exception as error:  # absl's own errors, or any error that the config file raises
        text = str(error)
        if isinstance(error, AttributeError) and text.endswith("no attribute 'get_config'"):
            text = (
                f"--config {path}: has no get_config(); define it there, def get_config(): return Config(...), as in "
                f"{default_config}"
            )
        elif not isinstance(error, flags.Error):
            text = f"{label}: {error.__cause__}" if label else f"--config {path}: {type(error).__name__}: {text}"
        elif "Traceback" in text:  # ml_collections puts the whole traceback of get_config() into its message
            last = text.strip().splitlines()[-1]
            text = f"{label}: {last.partition(': ')[2]}" if label else f"--config {path}: {last}"
        raise ValueError(text + _nearest_keyword(text)) from error
    if len(rest) > 1:
        raise ValueError(f"{rest[1]!r}: not a flag; {LISTING}")
    if values.resume and not workdir:
        raise ValueError("--resume: give the run's folder too, --workdir DIR")
    if of_weights:
        config = _in_every_entry(config, argv)
    check(config)
    name = Path(path.partition(":")[0]).stem if value_of("config", argv) or path == default_config else "resumed"
    topology = values["for"].value
    if topology and not values.dry_run:
        raise ValueError(f"--for {topology}: is for --dry_run; give that too")
    return Command(config, values.workdir, name, values.dry_run, topology, values.resume)


def _in_every_entry(config: Config, argv: list[str]) -> Config:
    """The config with the fields of the model that are given also in the entries of `mixers` that have their own."""
    prefix = "config.model."
    fields = {flag.removeprefix("no").removeprefix(prefix) for flag in _flags(argv) if prefix in flag}
    if "mixers" in fields or not fields:
        return config
    given = {field: getattr(config.model, field) for field in fields}
    mixers = tuple(with_given(mixer, given) for mixer in config.model.mixers)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, mixers=mixers))


def _with_value(flag: str, value: str, argv: list[str]) -> list[str]:
    """A copy of `argv` in which every --flag has the value `value`."""
    out, rest = [], iter(argv)
    for argument in rest:
        name, equals, _ = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == flag:
            if not equals:
                next(rest)
            argument = f"--{flag}={value}"
        out.append(argument)
    return out


def _check_flags(argv: list[str]) -> None:
    """Raise ValueError for an unknown flag or --config.section.field; the message names the nearest known one."""
    known = list(flatten(Config()))
    sections = [section.name for section in dataclasses.fields(Config)]
    for flag in _flags(argv):
        field = flag.removeprefix("no").removeprefix("config.")
        if flag in OWN or flag.removeprefix("no") in OWN or flag in ("flagfile", "undefok"):  # absl adds the last two
            continue
        if not flag.removeprefix("no").startswith("config."):
            near = nearest(flag, [*OWN, "help_config"])
            hint = f"; did you mean --{near}?" if near else _nearest_field(flag.replace("-", "_"), known, LISTING)
            raise ValueError(f"--{flag}: no such flag{hint}")
        if field in sections:
            raise ValueError(f"--config.{field}: is a section; set one of its fields: --config.{field}.FIELD=VALUE")
        if field not in known:
            raise ValueError(f"--config.{field}: no such field{_nearest_field(field, known)}")


def _flags(argv: list[str]) -> Iterator[str]:
    """The names of the flags in `argv`. An argument that is the value of the flag before it is left out."""
    truths = {name for name, value in flatten(Config()).items() if isinstance(value, bool)}
    rest = iter(argv[1:])
    for argument in rest:
        if argument == "--":
            return
        if not argument.startswith("-"):
            continue
        flag, equals, _ = argument.lstrip("-").partition("=")
        yield flag
        field = flag.removeprefix("config.")
        if not equals and (OWN.get(flag) or (field != flag and field not in truths)):
            next(rest, None)


def _nearest_keyword(text: str) -> str:
    """A hint for a misspelt argument of ModelConfig(...) or another section in a config file; else ""."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", text)
    if not found or "Did you mean" in text:
        return ""
    for section in (Config, *(field.default_factory for field in dataclasses.fields(Config))):
        if section.__name__ == found[1]:
            names = [field.name for field in dataclasses.fields(section)]
            return did_you_mean(found[2], names, f"; its fields are {', '.join(names)}")
    return ""


def _nearest_field(field: str, known: list[str], otherwise: str = "") -> str:
    # A field of this name in another section is the likeliest meaning; next, a field with a similar spelling.
    last = field.rpartition(".")[2]
    same = next((name for name in known if name.rpartition(".")[2] == last), None)
    if near := same or nearest(field, known):
        return f"; did you mean --config.{near}?"
    sections = ", ".join(dict.fromkeys(name.partition(".")[0] for name in known))
    return f"; {otherwise or f'the sections are {sections}'}"
