"""Tools: what the model is told, what it may be forced to write, and calls found in its text."""

import json

import pytest

from service.api.openai.answers import ChatCompletion, ChatCompletionChunk
from service.api.openai.tools import ForcedCalls, TaggedCalls, ToolCall
from service.engine.types import FinishReason
from tests.support.scripted_engine import Script, ScriptedStarter
from tests.support.scripted_server import scripted_server

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": PARAMETERS}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def with_parameters(parameters):
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def earlier_call(arguments):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}


def ask(client, **body):
    messages = [{"role": "user", "content": "hi"}]
    asked = json.dumps({"model": "paper", "messages": messages, "tools": [WEATHER], **body})
    return client.post("/v1/chat/completions", content=asked, headers={"content-type": "application/json"})


def serve(folder, *pieces, finish=FinishReason.STOP):
    return scripted_server(folder, ScriptedStarter(Script(pieces=pieces, finish=finish), max_model_len=2048))


def read(reader, text, size):
    """What a reader finds in a text that comes in pieces: text joined, calls by name and arguments."""
    found = [item for start in range(0, len(text), size) for item in reader.push(text[start : start + size])]
    found += reader.flush()
    joined, calls = "", []
    for item in found:
        if isinstance(item, ToolCall):
            calls.append((item.name, json.loads(item.arguments)))
        else:
            assert item
            joined += item
    return joined, calls


ROME, NOON = ("weather", {"city": "Rome"}), ("clock", {})


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text", ("plain text", [])),
        ("ends in space \n", ("ends in space \n", [])),
        (CALL, ("", [ROME])),
        ("Let me look.\n" + CALL, ("Let me look.", [ROME])),
        (CALL + "\n" + '<tool_call>{"name": "clock"}</tool_call>\n', ("", [ROME, NOON])),
        (CALL + " done ", ("done", [ROME])),
        ('<tool_call>{"name": "clock", "parameters": {}}', ("", [NOON])),
        ('<tool_call>{"name": "clock", "arguments": "{}"}</tool_call>', ("", [NOON])),
        ("<tool_call>not json</tool_call>", ("<tool_call>not json</tool_call>", [])),
        ('<tool_call>{"name": 3}</tool_call>', ('<tool_call>{"name": 3}</tool_call>', [])),
        ('<tool_call>{"name": "x", "arguments": [1]}', ('<tool_call>{"name": "x", "arguments": [1]}', [])),
        ("a < b <tool", ("a < b <tool", [])),
        ("<tool_call>" * 2, ("<tool_call>" * 2, [])),
        (
            '<tool_call>{"name": "x", "arguments": {"a": NaN}}',
            ('<tool_call>{"name": "x", "arguments": {"a": NaN}}', []),
        ),
    ],
)
def test_calls_between_tags_are_found_however_the_text_is_cut(text, expected, size):
    """What cannot be read as a call stays text."""
    assert read(TaggedCalls(only_one=False), text, size) == expected


def test_only_one_call_if_asked():
    """parallel_tool_calls false leaves the others out."""
    assert read(TaggedCalls(only_one=True), CALL + CALL, 5) == ("", [ROME])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("weather", ' {"city": "Rome"}', ("", [ROME])),
        ("weather", '{"city": "Ro', ('{"city": "Ro', [])),
        ("weather", "[1]", ("[1]", [])),
        (None, '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "clock"}]', ("", [ROME, NOON])),
        (None, '[{"name": "clock"}, 3]', ('[{"name": "clock"}, 3]', [])),
        (None, "[]", ("[]", [])),
        (None, "", ("", [])),
    ],
)
def test_forced_calls_are_the_whole_text(name, text, expected):
    """Cut before its end it is text."""
    assert read(ForcedCalls(name), text, 3) == expected


def test_the_model_is_told_of_tools_and_earlier_calls(tmp_path):
    """The template gets tools, calls with arguments as objects, and results; none if it may not call."""
    turns = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    with serve(tmp_path, "ok") as (client, starter):
        ask(client, messages=turns)
        ask(client, tool_choice="none")
        prompts = [bytes(i for i in r.prompt_token_ids if i < 256).decode() for r in starter.engines[0].requests]
    assert json.loads(prompts[0].splitlines()[1]) == [WEATHER]
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>' in prompts[0]
    assert "tool\nsunny" in prompts[0]
    assert "weather" not in prompts[1]


def test_a_call_is_an_answer(tmp_path):
    """Content is null, the reason is tool_calls, and the arguments are JSON."""
    with serve(tmp_path, CALL[:20], CALL[20:]) as (client, _):
        answer = ChatCompletion.model_validate_json(ask(client).text, extra="forbid")
        plain = ask(client, tool_choice="none").json()["choices"][0]
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    assert choice.message.tool_calls[0].function.name == "weather"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Rome"}
    assert plain["message"]["content"] == CALL
    assert plain["finish_reason"] == "stop"


def test_a_call_is_streamed_when_it_is_complete(tmp_path):
    """Text as it comes, then the call in one piece, then the reason; log probabilities of all tokens."""
    pieces = ("Look", ": ", *CALL)
    with serve(tmp_path, *pieces) as (client, _):
        lines = ask(client, stream=True, logprobs=True, max_tokens=200).text.split("\n\n")[:-2]
    chunks = [ChatCompletionChunk.model_validate_json(line.removeprefix("data: "), extra="forbid") for line in lines]
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.delta.content or "" for choice in choices) == "Look:"
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "weather")]
    assert choices[-1].finish_reason == "tool_calls"
    assert sum(len(choice.logprobs.content) for choice in choices if choice.logprobs) == len(pieces)


def test_a_call_that_was_cut_is_text(tmp_path):
    """The reason stays length."""
    with serve(tmp_path, CALL[:30], finish=FinishReason.LENGTH) as (client, _):
        choice = ask(client).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert "tool_calls" not in choice["message"]


def test_required_forces_a_list_of_calls(tmp_path):
    """The grammar names every tool, and one call only without parallel calls."""
    text = '[{"name": "weather", "arguments": {"city": "Rome"}}]'
    with serve(tmp_path, text) as (client, starter):
        choice = ask(client, tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False).json()[
            "choices"
        ][0]
        grammar = starter.engines[0].requests[0].sampling.grammar
    schema = json.loads(grammar.text)
    assert grammar.kind == "json_schema"
    assert (schema["type"], schema["minItems"], schema["maxItems"]) == ("array", 1, 1)
    assert [item["properties"]["name"]["const"] for item in schema["items"]["anyOf"]] == ["weather", "clock"]
    assert schema["items"]["anyOf"][0]["properties"]["arguments"] == PARAMETERS
    assert choice["finish_reason"] == "tool_calls"


def test_a_named_function_forces_its_arguments(tmp_path):
    """The text is the arguments alone."""
    named = {"type": "function", "function": {"name": "weather"}}
    with serve(tmp_path, '{"city": ', '"Rome"}') as (client, starter):
        choice = ask(client, tool_choice=named).json()["choices"][0]
        grammar = starter.engines[0].requests[0].sampling.grammar
    assert json.loads(grammar.text) == PARAMETERS
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}


def test_definitions_are_lifted_to_where_references_look(tmp_path):
    """$defs of a tool's parameters stand at the top of the forced schema."""
    defined = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "integer"}}}
    other = {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": defined}} for name in ("f", "g")]
    with serve(tmp_path, "[]") as (client, starter):
        ask(client, tools=tools, tool_choice="required")
        schema = json.loads(starter.engines[0].requests[0].sampling.grammar.text)
        tools[1]["function"]["parameters"] = other
        refused = ask(client, tools=tools, tool_choice="required")
    assert schema["$defs"] == {"A": {"type": "integer"}}
    assert "$defs" not in schema["items"]["anyOf"][0]["properties"]["arguments"]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "custom"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}, "mode": "auto"}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"messages": [earlier_call("x")]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}], "tool_choice": 3}, "tool_choice"),
        ({"tools": [with_parameters({"a": "\ud800"})]}, "tools.0.function.parameters"),
        ({"tools": [with_parameters({"$defs": 3})], "tool_choice": "required"}, "tools"),
        ({"tools": [with_parameters({"type": "bogus"})], "tool_choice": "required"}, "tools"),
        ({"messages": [earlier_call('{"a": "\\ud800"}')]}, "messages"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path, body, param):
    """Kinds of tools, names, choices and calls of the past."""
    with serve(tmp_path, "ok") as (client, _):
        response = ask(client, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_template_without_tools_is_told(tmp_path):
    """A model that cannot be shown its tools would never call one."""
    with serve(tmp_path, "ok") as (client, _):
        client.app.state.registry.get("paper").tokenizer.chat_template = "{{ messages[0]['content'] }}"
        refused = ask(client)
        passed = ask(client, tool_choice="none")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")
    assert passed.status_code == 200
