"""StrictConfig: the base of every configuration of the core.

A configuration is a frozen, keyword-only dataclass. It is written into whatever it produced, so it turns into plain
JSON values and back without loss, and it refuses a key it does not know: a misspelt option is an error that lists the
known ones, never a silent default.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self, Union

from onebit_core.errors import ConfigError


class StrictConfig:
    """Mixin for `@dataclass(frozen=True, kw_only=True)` classes: strict `from_dict`, lossless `to_dict`."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the configuration from plain values.

        Args:
            values: field name to JSON value; nested configurations as nested mappings.

        Raises:
            ConfigError: an unknown key, a missing required key, or a value of the wrong type.
        """
        name = cls.__name__
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name}: expected an object with named fields, got {type(values).__name__}")
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in fields:
                raise ConfigError(f"{name}: unknown option {key!r}; known: {', '.join(sorted(fields)) or 'none'}")
        for key, field in fields.items():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and key not in values:
                raise ConfigError(f"{name}: option {key!r} is required")
        return cls(**{key: _coerce(f"{name}.{key}", hints[key], value) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values; `from_dict(to_dict())` gives an equal configuration."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


def _plain(value: object) -> Any:
    """Turn configurations and tuples into dictionaries and lists."""
    if isinstance(value, StrictConfig):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _coerce(where: str, hint: Any, value: Any) -> Any:
    """Check one plain value against its annotation and convert lists to tuples, mappings to configurations."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _coerce_union(where, arguments, value)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_coerce(where, arguments[0], item) for item in value)
    if origin is dict or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected an object, got {value!r}")
        item = arguments[1] if arguments else Any
        return {str(key): _coerce(f"{where}.{key}", item, each) for key, each in value.items()}
    if isinstance(hint, type) and issubclass(hint, StrictConfig):
        return value if isinstance(value, hint) else hint.from_dict(value)
    return _coerce_scalar(where, hint, value)


def _coerce_union(where: str, options: tuple[Any, ...], value: Any) -> Any:
    """Take the first member of a union that accepts the value."""
    if value is None and type(None) in options:
        return None
    problems = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _coerce(where, option, value)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(problems[0])


def _coerce_scalar(where: str, hint: Any, value: Any) -> Any:
    """Check a bool, int, float or str; an int is a float, a bool is not an int, NaN is nothing."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where}: an integer of {len(str(value))} digits is too large a number") from None
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        expected = "true or false" if hint is bool else hint.__name__
        raise ConfigError(f"{where}: expected {expected}, got {value!r}")
    if isinstance(value, float) and value - value != 0:
        raise ConfigError(f"{where}: {value!r} is not a finite number")
    return value
