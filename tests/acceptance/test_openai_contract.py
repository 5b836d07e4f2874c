"""Every feature of OpenAI's contract through the real `openai` package, the real server and the real engine.

Whatever the client receives is also held against OpenAI's published schemas (conftest.py).
"""

import json
from typing import Literal

import openai
import pydantic
import pytest
import torch

from onebit_core.artifact.reader import load_model
from tests.support.openai_schemas import find_schemas

pytestmark = pytest.mark.acceptance

TEXT = "one two three"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "celsius": {"type": "boolean"}},
            "required": ["city", "celsius"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture
def client(openai_client):
    return openai_client


@pytest.fixture(scope="module")
def expected_logprobs(tiny_artifact):
    """Log probabilities of every token after each place of TEXT, by transformers."""
    loaded = load_model(tiny_artifact)
    with torch.no_grad():
        logits_1TV = loaded.model(torch.tensor([list(TEXT.encode())])).logits
    return logits_1TV[0].float().log_softmax(dim=-1)


def complete(client, **body):
    return client.completions.create(**{"model": "tiny", "prompt": TEXT, "max_tokens": 8, "temperature": 0, **body})


def chat(client, **body):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "temperature": 0}
    return client.chat.completions.create(**{**asked, **body})


def call(client, server, path, **body):
    """Ask an endpoint that the package has no method for."""
    return client.post(server.url + path, body=body, cast_to=object)


def test_echoed_log_probabilities_are_the_models(client, expected_logprobs):
    """Scoring a prompt gives what a forward pass of transformers gives, at every place and for the rivals."""
    choice = complete(client, echo=True, max_tokens=0, logprobs=5).choices[0]
    token_ids = torch.tensor(list(TEXT.encode()))
    expected = expected_logprobs[:-1].gather(1, token_ids[1:, None])[:, 0]
    assert choice.text == TEXT
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=2e-2)
    assert choice.logprobs.text_offset == list(range(len(TEXT)))
    rivals = expected_logprobs[:-1].topk(5).values.tolist()
    for told, values in zip(choice.logprobs.top_logprobs[1:], rivals, strict=True):
        assert sorted(told.values(), reverse=True)[:5] == pytest.approx(values, abs=2e-2)


def test_a_harness_scores_continuations(client):
    """The request of lm-eval: token arrays, echo, one token, and the continuation's places cut out."""
    prompts = [list(b"one two"), list(b"one two three")]
    answer = complete(client, prompt=prompts, echo=True, max_tokens=1, logprobs=1, seed=1)
    short, long = (choice.logprobs.token_logprobs for choice in answer.choices)
    assert [len(short), len(long)] == [8, 14]
    assert long[1:7] == pytest.approx(short[1:7], abs=1e-3)
    greedy = [max(top, key=top.get) for top in answer.choices[1].logprobs.top_logprobs[7:-1]]
    assert len(greedy) == 6


def test_a_stream_has_the_log_probabilities_of_the_answer(client):
    """Joined chunks are the four lists; text and lists agree, although characters are held back."""
    asked = {"logprobs": 2, "max_tokens": 40, "echo": True, "extra_body": {"ignore_eos": True}}
    whole = complete(client, **asked).choices[0]
    chunks = [chunk.choices[0] for chunk in complete(client, **asked, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [entry for chunk in chunks for entry in getattr(chunk.logprobs, name)]
        assert joined == getattr(whole.logprobs, name)
    assert len(whole.logprobs.tokens) == len(TEXT) + 40
    ends = {**asked, "stop": [whole.text[len(TEXT) + 20 :][:6], "never"]}  # text that may begin it is held back
    cut = complete(client, **ends).choices[0]
    chunks = [chunk.choices[0] for chunk in complete(client, **ends, stream=True)]
    assert cut.finish_reason == chunks[-1].finish_reason == "stop"
    assert [token for chunk in chunks for token in chunk.logprobs.tokens] == cut.logprobs.tokens
    assert whole.logprobs.tokens[: len(cut.logprobs.tokens)] == cut.logprobs.tokens


def test_chat_log_probabilities(client):
    """As many rivals as asked for, each with its bytes; the drawn token of a greedy answer is the first of them."""
    choice = chat(client, logprobs=True, top_logprobs=3).choices[0]
    for entry in choice.logprobs.content:
        assert [rival.logprob for rival in entry.top_logprobs] == sorted(
            (rival.logprob for rival in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].token == entry.token
    streamed = [chunk.choices[0] for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True)]
    told = [entry.token for chunk in streamed if chunk.logprobs for entry in chunk.logprobs.content]
    assert told == [entry.token for entry in choice.logprobs.content]


def test_best_of_returns_the_most_probable_draws(client):
    """The same draws one by one have the mean log probabilities that decide; all tokens are paid for."""
    asked = {"temperature": 1.5, "seed": 11, "extra_body": {"ignore_eos": True}}
    draws = complete(client, n=4, logprobs=0, **asked).choices
    ranked = sorted(draws, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    best = complete(client, n=2, best_of=4, **asked)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage.completion_tokens == 32
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, best_of=2, stream=True)
    assert refused.value.param == "best_of"


def test_bias_penalties_and_stop_tokens(client):
    """Numbers move the draw: a bias forces and forbids, penalties end a repetition, token ids end a text."""
    assert complete(client, logit_bias={"97": 100}).choices[0].text == "a" * 8
    assert complete(client, logit_bias={"97": 100}, extra_body={"stop_token_ids": [97]}).usage.completion_tokens == 1
    plain = complete(client, logprobs=0, max_tokens=24, extra_body={"ignore_eos": True}).choices[0].logprobs.tokens
    fresh = complete(
        client,
        logprobs=0,
        max_tokens=24,
        frequency_penalty=2,
        presence_penalty=2,
        extra_body={"ignore_eos": True, "repetition_penalty": 2.0},
    )
    assert len(set(fresh.choices[0].logprobs.tokens)) > len(set(plain))


def test_the_stop_text_is_returned_if_asked(client):
    """include_stop_str_in_output."""
    whole = complete(client, max_tokens=20).choices[0].text
    stop = whole[4]
    cut = complete(client, max_tokens=20, stop=stop, extra_body={"include_stop_str_in_output": True}).choices[0]
    assert cut.text == whole[: whole.index(stop) + 1]


def test_extensions_come_back_beside_openais_fields(client):
    """Token ids and prompt log probabilities, in vLLM's form."""
    extra = {"return_token_ids": True, "prompt_logprobs": 1, "min_tokens": 8, "top_k": 5, "min_p": 0.01, "priority": 1}
    choice = complete(client, temperature=1, seed=2, extra_body=extra).choices[0]
    assert choice.model_extra["prompt_token_ids"] == list(TEXT.encode())
    assert len(choice.model_extra["token_ids"]) == 8
    told = choice.model_extra["prompt_logprobs"]
    assert told[0] is None
    assert all(str(token_id) in entry for token_id, entry in zip(TEXT.encode()[1:], told[1:], strict=True))


def test_forms(client):
    """JSON that fits a schema, an object, a choice and an expression; cut short by nothing."""
    schema = WEATHER["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}
    said = chat(client, response_format=form, max_tokens=120, temperature=1, seed=1).choices[0]
    assert set(json.loads(said.message.content)) == {"city", "celsius"}
    assert said.finish_reason == "stop"
    for asked, allowed in (({"choice": ["yes", "no"]}, {"yes", "no"}), ({"regex": "(ab){2}"}, {"abab"})):
        text = complete(client, max_tokens=20, extra_body={"structured_outputs": asked}).choices[0].text
        assert text in allowed
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, extra_body={"structured_outputs": {"regex": "(("}})
    assert refused.value.param == "structured_outputs"


def test_the_packages_own_parser_of_forms(client):
    """`parse` sends a strict schema made of a class, and reads the answer into it."""

    class Report(pydantic.BaseModel):
        city: Literal["Rome", "Oslo"]
        warm: bool

    answer = client.chat.completions.parse(
        model="tiny", messages=[{"role": "user", "content": "hi"}], response_format=Report, max_tokens=120, seed=3
    )
    assert isinstance(answer.choices[0].message.parsed, Report)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_forced_tool_calls(client, choice):
    """A grammar makes even a random model call the tool; a stream joins to the same call."""
    asked = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200, "seed": 1}
    made = chat(client, **asked, temperature=1).choices[0]
    assert made.finish_reason == "tool_calls"
    assert made.message.content is None
    (one,) = made.message.tool_calls
    assert one.function.name == "weather"
    assert json.loads(one.function.arguments)["city"] in ("Rome", "Oslo")
    with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "hi"}], temperature=1, **asked
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert json.loads(final.message.tool_calls[0].function.arguments) == json.loads(one.function.arguments)
    turns = [
        {"role": "user", "content": "hi"},
        made.message.to_dict(),
        {"role": "tool", "tool_call_id": one.id, "content": "sunny"},
    ]
    assert chat(client, messages=turns, tools=[WEATHER]).choices[0].message.role == "assistant"


def test_a_cached_prompt_is_counted(client):
    """The second of two equal prompts finds pages of the first."""
    prompt = "cached prompts are counted in usage " * 4
    complete(client, prompt=prompt, max_tokens=1)
    again = complete(client, prompt=prompt, max_tokens=1).usage
    assert 0 < again.prompt_tokens_details.cached_tokens < again.prompt_tokens


def test_the_tokenizer_over_http(client, openai_server):
    """There and back again, and what a harness asks first."""
    tokens = call(client, openai_server, "/tokenize", prompt="höflich")["tokens"]
    assert tokens == list("höflich".encode())
    assert call(client, openai_server, "/detokenize", tokens=tokens) == {"prompt": "höflich"}
    info = client.get(openai_server.url + "/tokenizer_info", cast_to=object)
    assert info["eos_token"] == "<|endoftext|>"
    assert client.get(openai_server.url + "/version", cast_to=object)["version"]
    assert client.get(openai_server.url + "/load", cast_to=object) == {"server_load": 0}


def test_request_ids_go_in_and_out(client):
    """Of answers and of errors."""
    answer = complete(client, extra_headers={"x-request-id": "trace-1"})
    assert answer._request_id == "trace-1"
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, temperature=9, extra_headers={"x-request-id": "trace-2"})
    assert refused.value.request_id == "trace-2"


def test_all_was_held_against_openais_schemas(client, schema_check):
    """Nothing above was left unchecked."""
    if find_schemas() is None:
        pytest.skip("OpenAI's schemas are not here; OPENAI_SCHEMAS names the file")
    client.models.list()
    complete(client)
    list(complete(client, stream=True))
    chat(client)
    list(chat(client, stream=True))
    with pytest.raises(openai.NotFoundError):
        complete(client, model="other")
    names = {
        "CreateCompletionResponse",
        "CreateChatCompletionResponse",
        "CreateChatCompletionStreamResponse",
        "ListModelsResponse",
        "ErrorResponse",
    }
    assert names <= set(schema_check.checked)
