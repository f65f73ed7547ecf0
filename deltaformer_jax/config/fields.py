"""The rules of config fields: allowed values and special values, stated once, where the field is defined."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from deltaformer_jax.config.imports import import_object, is_import
from deltaformer_jax.config.mixer import Mixer
from deltaformer_jax.host.spelling import did_you_mean

_NOTHING = object()  # no value is this one


@dataclasses.dataclass(frozen=True)
class Rule:
    """The values that a field may have, and what some of them mean.

    least, above, below, most   bounds of a number: value >= least, > above, < below, <= most
    finite                      the number must be neither infinite nor NaN
    choices                     the allowed strings, or a function that returns them
    own                         the value that leaves the choice to the mixer or to the op that it calls. Flags cannot
                                give None, so each such field has another value for it
    none                        the value that None stands for; by default `own`
    zero_is_none                a mixer's constructor gets None in place of 0
    is_true                     the string that a mixer's constructor gets as True; it gets any other as False
    importable                  the string may be "package.module:NAME". It stands for that object or, if the object is
                                a class, for an instance made without arguments. If the config is not written to a
                                config.json, the object itself is allowed too
    mixers                      entries of the tuple may be a Mixer, not only names
    ids                         the tuple holds ids of tokens, integers of at least 0; it may be empty
    must_be_used                a value other than the default is refused if no mixer of the model takes the field
    """

    least: float | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None
    finite: bool = False
    choices: tuple[str, ...] | Callable[[], Iterable[str]] = ()
    own: Any = _NOTHING
    none: Any = _NOTHING
    zero_is_none: bool = False
    is_true: str | None = None
    importable: bool = False
    mixers: bool = False
    ids: bool = False
    must_be_used: bool = False

    @property
    def takes_none(self) -> bool:
        return self.own is not _NOTHING or self.none is not _NOTHING

    def allowed(self) -> str:
        """The bounds or choices as a phrase; "" where the type is all."""
        choices = tuple(self.choices() if callable(self.choices) else self.choices)
        if choices:
            own = () if self.own in (_NOTHING, "") else (self.own,)
            return ", ".join(dict.fromkeys((*own, *choices)))
        bounds = {"at least": self.least, "above": self.above, "below": self.below, "at most": self.most}
        said = [f"{word} {bound}" for word, bound in bounds.items() if bound is not None]
        lowest = self.above if self.least is None else self.least
        if isinstance(self.own, int | float) and lowest is not None and self.own < lowest:
            said = [f"{self.own} or {said[0]}", *said[1:]]
        if self.zero_is_none and said:
            said = [f"0 or {said[0]}", *said[1:]]
        return ", ".join([*said, *(["finite"] if self.finite else [])])

    def said(self, value: Any) -> Any:
        """`value`, or what None stands for."""
        if value is None and self.takes_none:
            return self.own if self.none is _NOTHING else self.none
        return value

    def for_mixer(self, name: str, value: Any) -> dict[str, Any]:
        """{name: the argument for a mixer's constructor}, or {} if the constructor's own default is to be used."""
        value = self.said(value)
        if value == self.own:
            return {}
        if self.is_true is not None:
            return {name: value == self.is_true}
        if self.importable and is_import(value):
            found = import_object(value, f"model.{name}")
            try:
                return {name: found() if isinstance(found, type) else found}
            except TypeError as error:
                raise ValueError(f"model.{name}: {value!r} cannot be made without arguments: {error}") from None
        return {name: None if self.zero_is_none and not value else value}

    def broken_by(self, value: Any) -> str | None:
        """The rule that `value` breaks, as "must be ...", or None if it breaks none. NaN breaks every bound."""
        if self.finite and not math.isfinite(value):
            return "must be a finite number"
        if self.least is not None and not value >= self.least:
            return f"must be at least {self.least}"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above}"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below}"
        if self.most is not None and not value <= self.most:
            return f"must be at most {self.most}"
        choices = tuple(self.choices() if callable(self.choices) else self.choices)
        if choices and value not in choices:
            return f"must be one of {', '.join(choices)}{did_you_mean(value, choices)}"
        return None

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, naming the field, for a value that breaks the rule."""
        value = self.said(value)
        if value == self.own or (self.zero_is_none and value == 0):
            return
        if reason := self.broken_by(value):
            own = "" if self.own is _NOTHING else f" ({self.own!r} leaves it to the mixer)"
            raise ValueError(f"{name} = {value!r}: {reason}{own}")


def setting(default: Any, meaning: str, **rule: Any) -> Any:
    """A dataclass field with that default, what it means to a user, and `Rule(**rule)`."""
    return dataclasses.field(default=default, metadata={"rule": Rule(**rule), "meaning": meaning})


def rule_of(field: dataclasses.Field) -> Rule:
    return field.metadata["rule"]


def meaning_of(field: dataclasses.Field) -> str:
    return field.metadata["meaning"]


def check_field(name: str, field: dataclasses.Field, value: Any, strict: bool = True) -> None:
    """Raise ValueError, naming the field, unless `value` has the field's type and satisfies its rule.

    `strict`: only the types that config.json can hold. Otherwise any real or integral number is allowed for a number,
    and an object where a string may name one.
    """
    rule, expected = rule_of(field), field.type
    if value is None and rule.takes_none:
        return
    if rule.ids:
        whole = int if strict else numbers.Integral
        if not isinstance(value, tuple) or not all(
            isinstance(id, whole) and not isinstance(id, bool) and id >= 0 for id in value
        ):
            raise ValueError(f"{name} = {value!r}: must be a tuple of ids of tokens, integers of at least 0")
        return
    if expected is tuple:
        allowed, said = (str | Mixer, "names or Mixer(name, ...)") if rule.mixers else (str, "names")
        if not isinstance(value, tuple) or not value or not all(isinstance(part, allowed) for part in value):
            raise ValueError(f"{name} = {value!r}: must be a tuple of {said}, at least one")
        return
    if rule.importable and not strict and not isinstance(value, str):
        return  # the op checks that it is a similarity
    if expected is float:
        if not isinstance(value, int | float if strict else numbers.Real) or (strict and isinstance(value, bool)):
            raise ValueError(f"{name} = {value!r}: must be a number")
    elif type(value) is not expected and (strict or expected is str or not isinstance(value, numbers.Integral)):
        raise ValueError(f"{name} = {value!r}: must be of type {expected.__name__}, not {type(value).__name__}")
    rule.check(name, value)
