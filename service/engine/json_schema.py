"""What of JSON Schema a grammar keeps; everything else is refused, because it would be ignored in silence.

A grammar reads a text from left to right and remembers only where it stands, so it cannot compare items (uniqueItems)
or intersect schemas (allOf, not, if). The compiler moreover ignores keywords without a type beside them, and those
beside $ref, anyOf, enum and the like. Keywords that validate nothing (title, description, default, ...) pass.

It keeps more than was asked for in two ways: an object has no properties but those that the schema names, unless
additionalProperties says so, and they come in the schema's order.

What the compiler keeps only in other words is written anew: oneOf of schemas that exclude each other as anyOf, and the
lengths of a string as a pattern, because it lets control characters into strings of limited length.
"""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, NoReturn

from service.engine.repetition import MOST_REPETITIONS, largest_repetition
from service.errors import BadRequest

DEEPEST = 32  # schemas within each other; compiling takes longer with every one
LARGEST_FACTOR = 1024  # of multipleOf

NOT_KEPT = frozenset(
    [
        "not",
        "if",
        "then",
        "else",
        "contains",
        "minContains",
        "maxContains",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "$dynamicRef",
        "$recursiveRef",
        "additionalItems",
    ]
)
KEYWORDS = {
    "string": frozenset(["minLength", "maxLength", "pattern", "format"]),
    "number": frozenset(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"]),
    "array": frozenset(["items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"]),
    "object": frozenset(
        [
            "properties",
            "required",
            "additionalProperties",
            "patternProperties",
            "propertyNames",
            "minProperties",
            "maxProperties",
            "unevaluatedProperties",
        ]
    ),
}
TYPED = frozenset().union(*KEYWORDS.values())
CHOICES = frozenset(["$ref", "anyOf", "oneOf", "allOf", "enum", "const"])
FORMATS = frozenset(
    [
        "date",
        "time",
        "date-time",
        "duration",
        "email",
        "uuid",
        "ipv4",
        "ipv6",
        "hostname",
        "uri",
        "uri-reference",
        "uri-template",
        "json-pointer",
        "relative-json-pointer",
    ]
)
WITHIN = frozenset(
    ["$defs", "definitions", "properties", "patternProperties", "anyOf", "oneOf", "allOf", "prefixItems"]
)
IMPLYING = {"array": {"items", "prefixItems"}, "object": {"properties"}}  # keywords that say the type themselves


def compilable_schema(text: str) -> str:
    """Return the schema in words that the compiler keeps.

    Raises:
        BadRequest: it is no JSON, or the grammar would not keep it; names the keyword, where it stands, and what to do.
    """
    try:
        schema = json.loads(text)
        return json.dumps(_Checker(schema).check(schema, "#", depth=0))
    except RecursionError:
        raise BadRequest("the JSON schema is nested too deeply", param="response_format") from None
    except ValueError as error:
        raise BadRequest(f"the JSON schema is no JSON: {error}", param="response_format") from None


class _Checker:
    """Checks one schema and those within it, and returns them rewritten; `where` is a JSON pointer."""

    def __init__(self, root: Any) -> None:
        self._root = root

    def check(self, schema: Any, where: str, *, depth: int, implied: str | None = None) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            _refuse(where, f"{json.dumps(schema)[:80]} is no schema; give an object or a boolean")
        if depth > DEEPEST:
            _refuse(where, f"schemas are nested more than {DEEPEST} deep; name the inner ones in $defs")
        for keyword in sorted(NOT_KEPT & schema.keys()):
            _refuse(where, f"{keyword} is not supported; leave it out, and check the answer for it")
        if schema.get("uniqueItems"):
            _refuse(where, "uniqueItems is not supported; leave it out, and check the answer for it")
        choices = sorted(CHOICES & schema.keys())
        if choices:
            self._check_choice(schema, choices, where)
        else:
            self._check_typed(schema, where, implied=implied)
        rewritten = {**schema, **{keyword: _copied(schema[keyword]) for keyword in WITHIN & schema.keys()}}
        for keyword, key, within, implies in _within(schema):
            checked = self.check(
                within, f"{where}/{keyword}" + ("" if key is None else f"/{key}"), depth=depth + 1, implied=implies
            )
            if key is None:
                rewritten[keyword] = checked
            else:
                rewritten[keyword][key] = checked
        return _rewritten(rewritten)

    def _check_choice(self, schema: Mapping[str, Any], choices: list[str], where: str) -> None:
        """Check a schema that is another, one of several, or one of given values."""
        first, *others = choices
        typed = TYPED if first in ("enum", "const") else TYPED | {"type"}
        beside = [*others, *sorted(typed & schema.keys())]
        if beside:
            _refuse(where, f"{beside[0]} beside {first} is not supported; write it into the schemas of {first}")
        if "type" in schema:
            _check_values(schema, first, where)
        if first == "$ref":
            self._resolve(schema, where)
        if first == "allOf" and len(_list(schema, "allOf", where)) > 1:
            _refuse(where, "allOf of several schemas is not supported; write them as one")
        if first == "oneOf":
            for one, other in combinations(_list(schema, "oneOf", where), 2):
                if not self._apart(self._resolve(one, where), self._resolve(other, where)):
                    _refuse(
                        where,
                        "a value could be of two of oneOf's schemas; use anyOf, or give each a required property "
                        "with a const of its own",
                    )

    def _check_typed(self, schema: Mapping[str, Any], where: str, *, implied: str | None) -> None:
        """Check a schema that says what its type has to be like."""
        _check_string(schema, where)
        typed = TYPED & schema.keys()
        types = _named_types(schema) or {implied} - {None}
        if typed and not types and not any(typed <= KEYWORDS[of] and typed & by for of, by in IMPLYING.items()):
            _refuse(where, f"{min(typed)} without a type is not supported; say the type beside it")
        if "multipleOf" in schema:
            factor = schema["multipleOf"]
            is_kept = isinstance(factor, int) and 1 <= factor <= LARGEST_FACTOR and "number" not in types
            if not is_kept or len(typed & KEYWORDS["number"]) > 1:
                _refuse(
                    where,
                    f"multipleOf is supported for integers without bounds, up to {LARGEST_FACTOR}; leave it out",
                )
        naming = typed & {"properties", "patternProperties", "propertyNames"}
        if len(naming) > 1 or ("patternProperties" in naming and schema.get("additionalProperties")):
            _refuse(where, f"{min(naming)} beside other ways to name properties is not supported; use one")
        for name in _list(schema, "required", where):
            if not isinstance(name, str) or name not in _properties(schema):
                _refuse(where, f"required names {json.dumps(name)[:80]}, which is not in properties; add it there")

    def _resolve(self, schema: Any, where: str) -> Any:
        """Follow $ref to a schema that is none."""
        seen: set[str] = set()
        while isinstance(schema, dict) and "$ref" in schema:
            reference = schema["$ref"]
            if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
                _refuse(where, f"$ref {json.dumps(reference)[:80]} leaves the schema; refer to its own $defs")
            if reference in seen:
                _refuse(where, f"$ref {reference[:80]!r} refers to itself only; give it something to be")
            seen.add(reference)
            schema = self._root
            for step in reference.split("/")[1:]:
                key = step.replace("~1", "/").replace("~0", "~")
                if not isinstance(schema, dict) or key not in schema:
                    _refuse(where, f"$ref {reference[:80]!r} refers to nothing; add it to the schema")
                schema = schema[key]
        return schema

    def _apart(self, one: Any, other: Any) -> bool:
        """Whether surely no value is of both schemas: other types, or a required property with other constants."""
        if not (isinstance(one, dict) and isinstance(other, dict)):
            return False
        types = _possible_types(one), _possible_types(other)
        if all(types) and not types[0] & types[1]:
            return True
        required = _list(other, "required", "#")
        both = [name for name in _list(one, "required", "#") if isinstance(name, str) and name in required]
        return any(_constants_differ(one, other, name) for name in both)


def _check_values(schema: Mapping[str, Any], keyword: str, where: str) -> None:
    """Check that the values of enum or const are of the type beside them."""
    values = _list(schema, "enum", where) if keyword == "enum" else [schema["const"]]
    for value in values:
        if not _types(value) & _named_types(schema):
            _refuse(where, f"{json.dumps(value)[:80]} in {keyword} is not of the type beside it")


def _check_string(schema: Mapping[str, Any], where: str) -> None:
    """Check what a schema says of strings."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", math.inf)
    if not (_is_count(least) and (most == math.inf or _is_count(most)) and least <= most):
        _refuse(where, "minLength and maxLength are whole numbers, the first not over the second")
    patterned = [key for key in ("pattern", "format") if key in schema]
    if len(patterned) > 1 or (patterned and {"minLength", "maxLength"} & schema.keys()):
        _refuse(where, f"{patterned[0]} beside another of pattern, format and lengths is not supported; use one")
    if largest_repetition(str(schema.get("pattern", ""))) > MOST_REPETITIONS:
        _refuse(where, f"pattern repeats something more than {MOST_REPETITIONS} times; use * or lower bounds")
    if "format" in schema and schema["format"] not in sorted(FORMATS):
        _refuse(
            where,
            f"format {json.dumps(schema['format'])[:80]} is not one of {', '.join(sorted(FORMATS))}; leave it out",
        )


def _constants_differ(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    values = []
    for schema in (one, other):
        of_name = _properties(schema).get(name)
        of_name = of_name if isinstance(of_name, dict) else {}
        constants = [of_name["const"]] if "const" in of_name else of_name.get("enum")
        if not isinstance(constants, list):
            return False
        values.append({json.dumps(value, sort_keys=True) for value in constants})
    return not values[0] & values[1]


def _properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def _within(schema: Mapping[str, Any]) -> Iterable[tuple[str, str | int | None, Any, str | None]]:
    """Return the schemas directly within one: keyword, place in its value, schema, and the type its place implies."""
    for keyword in ("$defs", "definitions", "properties", "patternProperties"):
        if isinstance(schema.get(keyword), dict):
            yield from ((keyword, name, within, None) for name, within in schema[keyword].items())
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(schema.get(keyword), list):
            yield from ((keyword, index, within, None) for index, within in enumerate(schema[keyword]))
    for keyword in ("items", "additionalProperties", "propertyNames"):
        if keyword in schema:
            yield keyword, None, schema[keyword], "string" if keyword == "propertyNames" else None


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list) else value


def _rewritten(schema: dict[str, Any]) -> dict[str, Any]:
    """Say in other words what the compiler does not keep as it stands."""
    if "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")
    if isinstance(schema.get("$ref"), str):
        schema["$ref"] = schema["$ref"].replace("/oneOf/", "/anyOf/")
    if "minLength" in schema or "maxLength" in schema:
        least, most = schema.pop("minLength", 0), schema.pop("maxLength", "")
        schema["pattern"] = f"^.{{{least},{most}}}$"
    return schema


def _named_types(schema: Mapping[str, Any]) -> set[str]:
    named = schema.get("type", [])
    names = named if isinstance(named, list) else [named]
    return {name for name in names if isinstance(name, str)}


def _possible_types(schema: Mapping[str, Any]) -> set[str]:
    """Return the types a value of the schema may have, integers as numbers; empty if any."""
    if "const" in schema or isinstance(schema.get("enum"), list):
        types = set().union(*map(_types, [schema["const"]] if "const" in schema else schema["enum"]))
    else:
        types = _named_types(schema)
    return {"number" if name == "integer" else name for name in types}


def _types(value: Any) -> set[str]:
    """Return the types a value has."""
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int():
            return {"number", "integer"}
        case float():
            return {"number", "integer"} if value.is_integer() else {"number"}
        case str():
            return {"string"}
        case list():
            return {"array"}
        case _:
            return {"object"}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _list(schema: Mapping[str, Any], keyword: str, where: str) -> list[Any]:
    """Return a keyword's list; empty if it is not there."""
    values = schema.get(keyword, [])
    if not isinstance(values, list):
        _refuse(where, f"{keyword} is {json.dumps(values)[:80]}; it must be a list")
    return values


def _refuse(where: str, reason: str) -> NoReturn:
    raise BadRequest(f"the JSON schema cannot be used, at {where}: {reason}", param="response_format")
