"""Whatever is drawn under a grammar is a text of it, and what cannot be kept is refused."""

import json
import re

import jsonschema
import pytest
import torch

from service.engine.grammar import GrammarCompiler, check_grammar
from service.engine.logit_edits import LogitEdits
from service.engine.sampling import Draw, sample, uniform_number
from service.engine.types import Grammar
from service.errors import BadRequest
from tests.support.tiny_model import EOS_ID, byte_tokenizer

VOCABULARY = 320  # the model has more tokens than the tokenizer
MOST_TOKENS = 600

NESTED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": -3, "maximum": 120},
        "ratio": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 2},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None, 3, {"x": [1]}]}, "minItems": 1, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[A-Z]{2}\\d{1,3}$"},
        "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {"leaf": {"type": ["boolean", "integer"], "title": "a leaf"}},
}
CHOICE = {
    "oneOf": [
        {
            "type": "object",
            "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
            "required": ["kind"],
        },
        {"type": "object", "properties": {"kind": {"const": "dog"}}, "required": ["kind"]},
        {"type": "string", "maxLength": 3},
    ]
}
FACTOR = {"type": "array", "items": {"type": "integer", "multipleOf": 7}, "maxItems": 2}
OPEN = {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "boolean"}, "maxProperties": 2}


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(byte_tokenizer(), vocab_size=VOCABULARY, end_token_ids=(EOS_ID,))


def drawn(compiler, grammar, *, seed, logits=None):
    """Draw at temperature 1 from flat logits until the end; None if it does not come in time."""
    check_grammar(grammar)
    state, tokens = compiler.compile(grammar), []
    row = torch.zeros(1, VOCABULARY) if logits is None else logits
    for index in range(MOST_TOKENS):
        edits = LogitEdits(allowed_bits=state.allowed_bits())
        (token,) = sample(row, [Draw(temperature=1.0, top_p=1.0, uniform=uniform_number(seed, index), edits=edits)])
        state.take(token)
        if token == EOS_ID:
            return bytes(tokens).decode()
        tokens.append(token)
    return None


@pytest.mark.parametrize("schema", [NESTED, CHOICE, FACTOR, OPEN], ids=["nested", "choice", "factor", "open"])
def test_every_text_is_of_its_schema(compiler, schema):
    """As jsonschema says, for many seeds; and not always the same text."""
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    logits = torch.zeros(1, VOCABULARY)
    logits[0, list(b'"}], ')] = 2.0  # so that strings and lists come to an end
    texts = [drawn(compiler, grammar, seed=seed, logits=logits) for seed in range(25)]
    ended = [text for text in texts if text is not None]
    assert len(set(ended)) > 8
    for text in ended:
        jsonschema.validate(json.loads(text), schema)


def test_a_json_object_is_one(compiler):
    """Any object, but nothing else."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, list(b'"}], ')] = 4.0
    texts = [drawn(compiler, Grammar(kind="json_object"), seed=seed, logits=logits) for seed in range(25)]
    ended = [text for text in texts if text is not None]
    assert len(set(ended)) > 8
    assert all(isinstance(json.loads(text), dict) for text in ended)


@pytest.mark.parametrize(
    "expression",
    ["(yes|no|maybe)", "[a-f]{3}-\\d+", "a.?b", "(ab|cd)*x+", "\\w{2,5}@[^@\\s]{1,4}\\.(de|org)", "é|日本|"],
)
def test_every_text_matches_its_expression(compiler, expression):
    """Whole, as re.fullmatch says; classes are those of ASCII, as in JavaScript."""
    texts = [drawn(compiler, Grammar(kind="regex", text=expression), seed=seed) for seed in range(40)]
    assert len(set(texts)) > 1
    for text in texts:
        assert re.fullmatch(expression, text, re.ASCII), text


def test_every_text_is_of_its_ebnf(compiler):
    """A language that no expression describes: as many a as b."""
    grammar = Grammar(kind="ebnf", text='root ::= "a" root "b" | "c"')
    texts = {drawn(compiler, grammar, seed=seed) for seed in range(40)}
    assert len(texts) > 2
    assert all(text == "a" * (len(text) // 2) + "c" + "b" * (len(text) // 2) for text in texts)


def allowed(state):
    bits = [int(word) for word in state.allowed_bits()]
    return {token for token in range(VOCABULARY) if bits[token // 32] >> token % 32 & 1}


def test_the_end_is_allowed_exactly_where_the_text_is_complete(compiler):
    """Before, it is not among the allowed; after the last character it is all there is."""
    state = compiler.compile(Grammar(kind="regex", text="ab?c*"))
    assert allowed(state) == {ord("a")}
    state.take(ord("a"))
    assert allowed(state) == {ord("b"), ord("c"), EOS_ID}
    state = compiler.compile(Grammar(kind="regex", text="ab"))
    state.take(ord("a"))
    assert EOS_ID not in allowed(state)
    state.take(ord("b"))
    assert allowed(state) == {EOS_ID}


def test_tokens_that_are_not_shown_are_never_allowed(compiler):
    """What a special token spells would be missing in the text; ids past the tokenizer spell nothing."""
    state = compiler.compile(Grammar(kind="regex", text=".*"))
    assert allowed(state) <= {*range(256), EOS_ID}
    assert {ord("<"), ord("i"), EOS_ID} <= allowed(state)


def test_a_token_that_is_not_allowed_is_an_error(compiler):
    """It cannot come from the sampler; if it does, the sequence must not go on."""
    with pytest.raises(RuntimeError, match="token 98"):
        compiler.compile(Grammar(kind="regex", text="a")).take(ord("b"))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar(kind="regex", text="(a"), "not closed"),
        (Grammar(kind="regex", text="a(?=b)"), "Lookahead"),
        (Grammar(kind="ebnf", text="root ::= foo"), '"foo" is not defined'),
        (Grammar(kind="ebnf", text='root ::= root "a"'), "no text follows"),
        (Grammar(kind="json_schema", text="{"), "no JSON"),
        (Grammar(kind="json_schema", text="[" * 60_000), "nested too deeply"),
        (Grammar(kind="json_schema", text='{"type": "foo"}'), "foo"),
        (Grammar(kind="regex", text="a" * 70_000), "longer than"),
        (Grammar(kind="gbnf", text="x"), "json_object"),
    ],
    ids=lambda value: str(getattr(value, "text", value))[:20],
)
def test_what_cannot_be_compiled_is_refused(grammar, reason):
    """With the compiler's reason, and without where in its source."""
    with pytest.raises(BadRequest, match=re.escape(reason)) as refused:
        check_grammar(grammar)
    assert ".cc" not in refused.value.message
