"""POST /v1/chat/completions over a scripted engine."""

import json

import pytest

from service.api.openai.answers import ChatCompletion, ChatCompletionChunk
from tests.support.scripted_server import scripted_server


@pytest.fixture
def server(tmp_path):
    with scripted_server(tmp_path) as running:
        yield running


def chat(client, **body):
    messages = [{"role": "user", "content": "hi"}]
    return client.post("/v1/chat/completions", json={"model": "paper", "messages": messages, **body})


def test_the_conversation_is_written_by_the_models_template(server):
    """Roles and turns reach the engine as the chat template writes them, special tokens as single ids."""
    client, starter = server
    chat(
        client,
        messages=[{"role": "developer", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
    )
    start, end = 257, 258
    expected = (
        start, *b"system\nbe", end, *b"\n", start, *b"user\na", end, *b"\n", start, *b"assistant\n",
    )  # fmt: skip
    assert starter.engines[0].requests[0].prompt_token_ids == expected


def test_an_answer_is_a_message(server):
    """The whole answer fits its schema."""
    answer = ChatCompletion.model_validate_json(chat(server[0]).text, extra="forbid")
    assert answer.choices[0].message.content == "Hello world"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 3


def test_a_stream_opens_with_the_role(server):
    """First the role, then text, then the reason, then [DONE]."""
    lines = chat(server[0], stream=True, n=2).text.split("\n\n")[:-1]
    assert lines.pop() == "data: [DONE]"
    chunks = [ChatCompletionChunk.model_validate_json(line.removeprefix("data: "), extra="forbid") for line in lines]
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert (own[0].delta.role, own[0].delta.content) == ("assistant", "")
        assert "".join(choice.delta.content or "" for choice in own) == "Hello world"
        assert [choice.finish_reason for choice in own] == [None, None, None, "stop"]


def test_the_default_length_is_what_the_context_leaves(server):
    """Chat has no default of 16; both names of the limit work, the newer one first."""
    client, starter = server
    chat(client)
    chat(client, max_tokens=5)
    chat(client, max_tokens=5, max_completion_tokens=6)
    requests = starter.engines[0].requests
    assert requests[0].sampling.max_tokens == 64 - len(requests[0].prompt_token_ids)
    assert [request.sampling.max_tokens for request in requests[1:]] == [5, 6]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "assistant"}]}, "missing_required_parameter", "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "invalid_value",
            "messages.0.content.0.type",
        ),
        ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x" * 64}]}, "context_length_exceeded", "messages"),
        ({"functions": [{"name": "f"}]}, "unsupported_parameter", "functions"),
        ({"modalities": ["audio"]}, "unsupported_parameter", "modalities"),
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logprobs": 1}, "invalid_value", "logprobs"),
        ({"chat_template": "{{ 1 }}"}, "unsupported_parameter", "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "invalid_value", "chat_template_kwargs"),
        ({"continue_final_message": True}, "invalid_value", "continue_final_message"),
        ({"prompt": "x"}, "unknown_parameter", "prompt"),
    ],
)
def test_what_is_not_served_is_refused_by_name(server, body, code, param):
    """Tools, formats, templates of the caller: a 400 that names the field."""
    response = chat(server[0], **body)
    assert response.status_code == 400
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == (code, param)


def test_harmless_values_pass(server):
    """The defaults that clients send along are no reason to refuse."""
    body = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logprobs": False,
        "parallel_tool_calls": True,
    }
    assert chat(server[0], **body).status_code == 200


def test_a_template_that_refuses_is_a_400(server):
    """A template may insist on an order of roles; that is the caller's to mend."""
    client, _ = server
    model = client.app.state.registry.get("paper")
    model.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    response = chat(client)
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]
    model.tokenizer.chat_template = None
    assert "no chat template" in json.loads(chat(client).text)["error"]["message"]
