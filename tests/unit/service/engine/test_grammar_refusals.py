"""Whatever is sent as a grammar is compiled or refused; nothing else is raised."""

import json
from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.grammar import check_grammar
from service.engine.json_schema import CHOICES, KEYWORDS, NOT_KEPT
from service.engine.types import Grammar
from service.errors import BadRequest

KEYS = sorted({"type", "$defs", "title", "uniqueItems", *CHOICES, *NOT_KEPT, *frozenset().union(*KEYWORDS.values())})
TYPES = ["string", "number", "integer", "array", "object", "null", "boolean"]
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**20),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["#", "#/$defs/a", "date", "^a{1,3}$", "(", "\ud800", "a\0b", *TYPES]),
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
        st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
        st.fixed_dictionaries({"type": st.sampled_from(TYPES)}, optional={key: inner for key in KEYS if key != "type"}),
    ),
    max_leaves=12,
)


def check(kind, text):
    with suppress(BadRequest):
        check_grammar(Grammar(kind=kind, text=text))


@settings(max_examples=300, deadline=None)
@given(VALUES)
def test_any_json_is_a_schema_or_refused(schema):
    """Keywords in wrong places, of wrong types, with numbers and texts that nobody means."""
    check("json_schema", json.dumps(schema))
    check("json_schema", json.dumps(schema, ensure_ascii=False))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["regex", "ebnf", "json_schema"]), st.text(max_size=40) | st.text("ab(){}[]|*+?^$\\.,12\ud800"))
def test_any_text_is_a_grammar_or_refused(kind, text):
    """Unbalanced, half escaped, or with characters that have no encoding."""
    check(kind, text)
    check("ebnf", f"root ::= {text}")


def test_deep_nesting_is_refused():
    """It must not exhaust the stack of the server."""
    for kind, text in (
        ("regex", "(" * 20_000 + "a" + ")" * 20_000),
        ("ebnf", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
        ("json_schema", '{"const": ' + "[" * 900 + "]" * 900 + "}"),
        ("json_schema", '{"enum": [' + '{"a":' * 5_000 + "1" + "}" * 5_000 + "]}"),
    ):
        check(kind, text)
