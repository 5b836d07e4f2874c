"""Keywords that a grammar would ignore are refused; those it keeps, and those that validate nothing, pass."""

import json

import pytest

from service.engine.json_schema import DEEPEST, compilable_schema
from service.errors import BadRequest

INTEGER, STRING = {"type": "integer"}, {"type": "string"}


def in_depth(number):
    schema = INTEGER
    for _ in range(number):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": STRING}, "not is not supported"),
        ({"if": STRING, "then": INTEGER}, "if is not supported"),
        ({"type": "array", "contains": STRING}, "contains"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"allOf": [INTEGER, {"type": "integer", "minimum": 3}]}, "allOf of several"),
        ({"anyOf": [INTEGER, STRING], "minLength": 3}, "minLength beside anyOf"),
        ({"anyOf": [{"minLength": 1}], "type": "string"}, "type beside anyOf"),
        ({"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": INTEGER}}, "minimum beside $ref"),
        ({"oneOf": [INTEGER, {"type": "number"}]}, "two of oneOf"),
        ({"oneOf": [{"type": "object", "properties": {"a": {"const": c}}} for c in (1, 2)]}, "two of oneOf"),
        ({"type": "string", "enum": ["a", 1]}, "1 in enum"),
        ({"type": "integer", "const": True}, "true in const"),
        ({"minimum": 3}, "without a type"),
        ({"required": ["a"]}, "without a type"),
        ({"properties": {"a": INTEGER}, "minimum": 3}, "without a type"),
        ({"type": "string", "pattern": "^a+$", "minLength": 3}, "pattern beside"),
        ({"type": "string", "format": "regex"}, 'format "regex"'),
        ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
        ({"type": "integer", "multipleOf": 5000}, "multipleOf"),
        ({"type": "integer", "multipleOf": 5, "minimum": 3}, "multipleOf"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, '"b", which is not in properties'),
        ({"type": "object", "properties": {"a": {}}, "propertyNames": {"maxLength": 3}}, "name properties"),
        ({"$ref": "http://example.com/schema"}, "leaves the schema"),
        ({"$ref": "#"}, "refers to itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "refers to itself"),
        ({"$ref": "#/$defs/b", "$defs": {"a": INTEGER}}, "refers to nothing"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength and maxLength"),
        ({"type": "string", "maxLength": -1}, "minLength and maxLength"),
        ([], "is no schema"),
        ({"type": "array", "items": [INTEGER]}, "is no schema"),
        (in_depth(DEEPEST + 1), "nested more than"),
        ({"properties": {"a": {"type": "array", "items": {"not": STRING}}}}, "at #/properties/a/items: not"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_is_not_kept_is_refused(schema, reason):
    """Naming the keyword and where it stands."""
    with pytest.raises(BadRequest) as refused:
        compilable_schema(json.dumps(schema))
    assert reason in refused.value.message
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"title": "t", "description": "d", "default": 3, "examples": [1], "x-own": 1},
        {"type": ["integer", "string"], "minimum": 3, "minLength": 2},
        {"type": "string", "enum": ["a", "b"]},
        {"type": "integer", "const": 3},
        {"properties": {"a": INTEGER}, "required": ["a"]},
        {"anyOf": [INTEGER, {"type": "null"}], "default": None, "title": "A"},
        {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": INTEGER}},
        {"oneOf": [INTEGER, STRING, {"type": "null"}]},
        {
            "oneOf": [
                {"type": "object", "properties": {"kind": {"enum": [kind]}}, "required": ["kind"]} for kind in "ab"
            ]
        },
        {"type": "object", "propertyNames": {"maxLength": 3}, "additionalProperties": INTEGER},
        {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}},
        in_depth(DEEPEST),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_is_kept_passes(schema):
    """So does what says nothing about the value."""
    assert isinstance(json.loads(compilable_schema(json.dumps(schema))), dict | bool)


@pytest.mark.parametrize(
    ("schema", "rewritten"),
    [
        ({"type": "string", "maxLength": 3}, {"type": "string", "pattern": "^.{0,3}$"}),
        ({"items": {"type": "string", "minLength": 3}}, {"items": {"type": "string", "pattern": "^.{3,}$"}}),
        ({"oneOf": [INTEGER, STRING]}, {"anyOf": [INTEGER, STRING]}),
        ({"$defs": {"oneOf": {"oneOf": [INTEGER, STRING]}}}, {"$defs": {"oneOf": {"anyOf": [INTEGER, STRING]}}}),
        ({"const": {"oneOf": 1, "minLength": 2}}, {"const": {"oneOf": 1, "minLength": 2}}),
        ({"properties": {"maxLength": INTEGER}}, {"properties": {"maxLength": INTEGER}}),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_is_kept_in_other_words_only_is_rewritten(schema, rewritten):
    """Keywords are, and values and properties of the same names are not."""
    assert json.loads(compilable_schema(json.dumps(schema))) == rewritten
