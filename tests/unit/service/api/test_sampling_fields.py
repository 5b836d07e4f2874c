"""Every field about sampling, prompts and forms reaches the engine as it is meant."""

import json

import pytest

from service.engine.types import Grammar
from tests.support.scripted_engine import ScriptedStarter
from tests.support.scripted_server import scripted_server

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.fixture
def server(tmp_path):
    with scripted_server(tmp_path, ScriptedStarter(max_model_len=256)) as running:
        yield running


def sent(server, path="/v1/completions", **body):
    """The engine request that a body becomes."""
    client, starter = server
    filled = {"prompt": "hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    response = client.post(path, json={"model": "paper", **filled, **body})
    assert response.status_code == 200, response.text
    return starter.engines[0].requests[-1]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("field", "value", "name", "expected"),
    [
        ("temperature", 0, "temperature", 0.0),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", 7, "top_k", 7),
        ("top_k", -1, "top_k", 0),
        ("top_k", 0, "top_k", 0),
        ("min_p", 0.25, "min_p", 0.25),
        ("frequency_penalty", -2, "frequency_penalty", -2.0),
        ("presence_penalty", 1.5, "presence_penalty", 1.5),
        ("repetition_penalty", 1.25, "repetition_penalty", 1.25),
        ("logit_bias", {"5": -100, "7": 1.5}, "logit_bias", ((5, -100.0), (7, 1.5))),
        ("min_tokens", 3, "min_tokens", 3),
        ("max_tokens", 4, "max_tokens", 4),
        ("max_completion_tokens", 5, "max_tokens", 5),
        ("stop_token_ids", [1, 2], "stop_token_ids", (1, 2)),
        ("include_stop_str_in_output", True, "include_stop", True),
        ("ignore_eos", True, "ignore_eos", True),
        ("stop", "x", "stop", ("x",)),
        ("seed", 3, "seed", 3),
        ("prompt_logprobs", 2, "prompt_logprobs", 2),
        ("response_format", {"type": "json_object"}, "grammar", Grammar(kind="json_object")),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
            "grammar",
            Grammar(kind="json_schema", text=json.dumps(SCHEMA)),
        ),
        ("structured_outputs", {"json": SCHEMA}, "grammar", Grammar(kind="json_schema", text=json.dumps(SCHEMA))),
        ("structured_outputs", {"regex": "a+"}, "grammar", Grammar(kind="regex", text="a+")),
        (
            "structured_outputs",
            {"choice": ["🎉", 'no"']},
            "grammar",
            Grammar(kind="ebnf", text='root ::= "🎉" | "no\\""'),
        ),
        (
            "structured_outputs",
            {"grammar": 'root ::= "a"'},
            "grammar",
            Grammar(kind="ebnf", text='root ::= "a"'),
        ),
    ],
)
def test_a_field_becomes_a_sampling_parameter(server, path, field, value, name, expected):
    """The same in both endpoints, and every other parameter keeps its default."""
    plain, changed = sent(server, path).sampling, sent(server, path, **{field: value}).sampling
    assert getattr(changed, name) == expected
    different = {slot for slot in plain.__slots__ if getattr(plain, slot) != getattr(changed, slot)}
    assert different <= {name}


def test_priority_and_salt_travel_with_the_request(server):
    """They are the scheduler's and the cache's."""
    request = sent(server, priority=-3, cache_salt="tenant")
    assert (request.priority, request.cache_salt) == (-3, "tenant")


def test_completions_of_one_prompt_are_a_group(server):
    """Figures of requests count a call's prompt once."""
    client, starter = server
    client.post("/v1/completions", json={"model": "paper", "prompt": ["a", "b"], "n": 2})
    groups = [(request.group, request.group_size) for request in starter.engines[0].requests]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert {size for _, size in groups} == {2}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_prompt_keeps_its_end_when_it_is_truncated(server, path):
    """truncate_prompt_tokens keeps so many tokens from the end; -1 what leaves room."""
    whole = sent(server, path).prompt_token_ids
    assert sent(server, path, truncate_prompt_tokens=1).prompt_token_ids == whole[-1:]
    assert sent(server, path, truncate_prompt_tokens=99).prompt_token_ids == whole
    long = (
        {"prompt": "x" * 300} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x" * 300}]}
    )
    assert len(sent(server, path, truncate_prompt_tokens=-1, max_tokens=6, **long).prompt_token_ids) == 250


def test_a_truncated_echo_is_what_was_kept(server):
    """What the model did not read is not repeated."""
    client, _ = server
    body = {"model": "paper", "prompt": "abcdef", "echo": True, "truncate_prompt_tokens": 2, "max_tokens": 0}
    assert client.post("/v1/completions", json=body).json()["choices"][0]["text"] == "ef"


def test_a_turn_may_be_left_open(server):
    """continue_final_message writes no end of the last turn and no new one."""
    client, starter = server
    model = client.app.state.registry.get("paper")
    assert bytes(sent(server, "/v1/chat/completions").prompt_token_ids[-10:]) == b"assistant\n"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Sure, "}]
    options = {"messages": messages, "add_generation_prompt": False, "continue_final_message": True}
    ids = sent(server, "/v1/chat/completions", **options).prompt_token_ids
    assert model.tokenizer.decode(ids).endswith("assistant\nSure, ")
    assert starter.engines[0].requests[-1].prompt_token_ids[-1] == ord(" ")


def test_template_variables_reach_the_template(server):
    """chat_template_kwargs are the template's own switches."""
    client, _ = server
    client.app.state.registry.get("paper").tokenizer.chat_template = "{{ mood }}!"
    ids = sent(server, "/v1/chat/completions", chat_template_kwargs={"mood": "gay"}).prompt_token_ids
    assert bytes(ids) == b"gay!"
