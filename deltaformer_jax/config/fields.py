"""What is known of a setting, stated once, where the setting is defined: its type, its default and its `Rule`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any

from deltaformer_jax.config.imports import import_object, is_import
from deltaformer_jax.config.mixer import Mixer

_NOTHING = object()  # no value is this one


@dataclasses.dataclass(frozen=True)
class Rule:
    """The values that a field may have, and what some of them mean.

    least, above, below, most   bounds of a number
    choices                     the names that a text may be, or a function that returns them
    own                         the value that leaves the choice to the mixer (or to the op that it calls); None is the
                                same. Flags cannot say None, so each such field has a value of its own for it
    none                        the value that a mixer is given as None: without the thing
    is_true                     the text that a mixer is given as True; any other is False
    importable                  the text may be "package.module:NAME", which stands for that object, or if it is a class
                                for one made without arguments
    must_be_used                a value other than the default is refused in a model none of whose mixers has the field
    """

    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    choices: tuple[str, ...] | Callable[[], Iterable[str]] = ()
    own: Any = _NOTHING
    none: Any = _NOTHING
    is_true: str | None = None
    importable: bool = False
    must_be_used: bool = False

    @property
    def has_own(self) -> bool:
        return self.own is not _NOTHING

    def for_mixer(self, name: str, value: Any) -> dict[str, Any]:
        """{name: what a mixer's constructor is given}, or {} where the constructor's own default is to stand."""
        if value is None or value == self.own:
            return {}
        if self.is_true is not None:
            return {name: value == self.is_true}
        if self.importable and is_import(value):
            found = import_object(value, f"model.{name}")
            return {name: found() if isinstance(found, type) else found}
        return {name: None if value == self.none else value}

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, naming the field, for a value that breaks the rule."""
        if value is None or value == self.own:
            return
        # Written so that NaN is refused.
        if self.least is not None and not value >= self.least:
            raise ValueError(f"{name} = {value}: must be at least {self.least}")
        if self.above is not None and not value > self.above:
            raise ValueError(f"{name} = {value}: must be above {self.above}")
        if self.below is not None and not value < self.below:
            raise ValueError(f"{name} = {value}: must be below {self.below}")
        if self.most is not None and not value <= self.most:
            raise ValueError(f"{name} = {value}: must be at most {self.most}")
        choices = tuple(self.choices() if callable(self.choices) else self.choices)
        if choices and value not in choices:
            raise ValueError(f"{name} = {value!r}: must be one of {', '.join(choices)}{nearest(value, choices)}")


def nearest(given: Any, names: Iterable[str]) -> str:
    """ "; did you mean NAME?" for the name most like the one given, "" where none is like it."""
    near = difflib.get_close_matches(str(given), list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def setting(default: Any, **rule: Any) -> Any:
    """A dataclass field with that default and `Rule(**rule)`."""
    return dataclasses.field(default=default, metadata={"rule": Rule(**rule)})


def rule_of(field: dataclasses.Field) -> Rule:
    return field.metadata.get("rule", Rule())


def check_field(name: str, field: dataclasses.Field, value: Any) -> None:
    """Raise ValueError, naming the field, unless `value` has the field's type and keeps its rule."""
    rule, expected = rule_of(field), field.type
    if value is None and rule.has_own:
        return
    if expected is tuple:
        if not isinstance(value, tuple) or not value or not all(isinstance(part, str | Mixer) for part in value):
            raise ValueError(f"{name} = {value!r}: must be a tuple of names or Mixer(name, ...), at least one")
    elif expected is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} = {value!r}: must be a number")
    elif type(value) is not expected:
        raise ValueError(f"{name} = {value!r}: must be of type {expected.__name__}, not {type(value).__name__}")
    rule.check(name, value)
