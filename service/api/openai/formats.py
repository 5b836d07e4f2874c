"""What form a completion's text must have, from four fields to one grammar for the engine.

    response_format       {"type": "json_object"} | {"type": "json_schema", "json_schema": {"name", "schema"}}
    structured_outputs    {"json"} | {"regex"} | {"choice"} | {"grammar"}
    tool_choice           "required": a list of calls · one function: its arguments

A grammar that cannot be compiled is refused before the engine sees it.
"""

import json
from collections.abc import Sequence
from typing import Any

from service.api.openai.conversation import FunctionDefinition, NamedTool, Tool
from service.api.openai.requests import ChatBody, SamplingBody, StructuredOutputs
from service.engine.types import Grammar
from service.errors import BadRequest

NO_ARGUMENTS = {"type": "object", "properties": {}}

Json = dict[str, Any]


def grammar_of(body: SamplingBody) -> Grammar | None:
    """Return what response_format or structured_outputs ask for; None if any text will do.

    Raises:
        BadRequest: it cannot be compiled.
    """
    if body.structured_outputs is not None:
        return _checked(_structured(body.structured_outputs), "structured_outputs")
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    schema = asked.json_schema.schema_ if asked.json_schema is not None else None
    grammar = Grammar(kind="json_object") if schema is None else Grammar(kind="json_schema", text=_written(schema))
    return _checked(grammar, "response_format")


def forced_calls(body: ChatBody) -> Grammar | None:
    """Return the grammar of the tool calls that tool_choice forces; None if it forces none.

    Raises:
        BadRequest: the parameters of two tools define different things under one name, or are no schema.
    """
    tools = [tool.function for tool in body.tools or ()]
    if isinstance(body.tool_choice, NamedTool):
        name = body.tool_choice.function.name
        schema = next(_parameters(tool) for tool in tools if tool.name == name)
    elif body.tool_choice == "required":
        schema = _list_of_calls(tools, only_one=body.parallel_tool_calls is False)
    else:
        return None
    return _checked(Grammar(kind="json_schema", text=_written(schema)), "tools")


def _structured(asked: StructuredOutputs) -> Grammar:
    if asked.json_ is not None:
        text = asked.json_ if isinstance(asked.json_, str) else _written(asked.json_)
        return Grammar(kind="json_schema", text=text)
    if asked.regex is not None:
        return Grammar(kind="regex", text=asked.regex)
    if asked.choice is not None:
        # JSON's escapes are the grammar's, but for the pair of \u that JSON may write for one character
        quoted = [json.dumps(choice, ensure_ascii=False) for choice in asked.choice]
        return Grammar(kind="ebnf", text="root ::= " + " | ".join(quoted))
    return Grammar(kind="ebnf", text=asked.grammar or "")


def _list_of_calls(tools: Sequence[FunctionDefinition], *, only_one: bool) -> Json:
    """Return the schema of [{"name", "arguments"}, ...]; $defs of the tools are lifted to the top, where $ref looks."""
    definitions: Json = {}
    calls = []
    for tool in tools:
        parameters = dict(_parameters(tool))
        own = parameters.pop("$defs", {})
        if not isinstance(own, dict):
            raise BadRequest(f"$defs of tool {tool.name!r} must be an object", param="tools")
        for name, definition in own.items():
            if definitions.setdefault(name, definition) != definition:
                raise BadRequest(f"two tools define {name!r} differently in their $defs; rename one", param="tools")
        properties = {"name": {"const": tool.name}, "arguments": parameters}
        calls.append({"type": "object", "properties": properties, "required": ["name", "arguments"]})
    schema: Json = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if only_one:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


def _parameters(tool: FunctionDefinition) -> Json:
    return tool.parameters or NO_ARGUMENTS


def _written(schema: Json) -> str:
    return json.dumps(schema, ensure_ascii=False)


def _checked(grammar: Grammar, param: str) -> Grammar:
    """Return the grammar if it can be compiled; `param` is the field it came from.

    Raises:
        BadRequest: it cannot.
    """
    from service.engine.grammar import check_grammar  # imports torch, which the server's start does not wait for

    try:
        check_grammar(grammar)
    except BadRequest as error:
        raise BadRequest(error.message, param=param) from None
    return grammar


def shown_tools(body: ChatBody) -> list[Tool]:
    """Return the tools the model is told of: none if it may not call any."""
    return list(body.tools or ()) if body.tool_choice != "none" else []
