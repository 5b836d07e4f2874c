"""StrictConfig: lossless, strict, and clear about what is wrong."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner(StrictConfig):
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Outer(StrictConfig):
    name: str
    kind: Literal["a", "b"] = "a"
    share: float = 0.5
    inner: Inner = field(default_factory=Inner)
    texts: tuple[str, ...] = ()
    limit: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def test_values_survive_the_round_trip():
    """to_dict gives plain JSON values from which an equal configuration is built."""
    config = Outer(name="x", kind="b", share=0.25, inner=Inner(size=3), texts=("p", "q"), limit=7, extra={"k": [1]})
    assert Outer.from_dict(config.to_dict()) == config
    assert config.to_dict()["inner"] == {"size": 3}
    assert config.to_dict()["texts"] == ["p", "q"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "option 'name' is required"),
        ({"name": "x", "nmae": 1}, "unknown option 'nmae'; known: extra, inner, kind"),
        ({"name": 3}, "Outer.name: expected str, got 3"),
        ({"name": "x", "kind": "c"}, "Outer.kind: 'c' is not one of 'a', 'b'"),
        ({"name": "x", "share": True}, "Outer.share: expected float, got True"),
        ({"name": "x", "share": float("inf")}, "not a finite number"),
        ({"name": "x", "inner": {"size": 1.5}}, "Inner.size: expected int, got 1.5"),
        ({"name": "x", "inner": 4}, "Inner: expected an object"),
        ({"name": "x", "texts": "p"}, "Outer.texts: expected a list"),
        ({"name": "x", "limit": "7"}, "Outer.limit: expected int"),
        ([], "Outer: expected an object"),
    ],
)
def test_what_cannot_be_meant_is_named(values, message):
    """The message holds the option, the value and what would do."""
    with pytest.raises(ConfigError) as caught:
        Outer.from_dict(values)
    assert message in str(caught.value)


def test_an_int_is_a_float():
    """JSON writes 1.0 as 1."""
    assert Outer.from_dict({"name": "x", "share": 1}).share == 1.0
