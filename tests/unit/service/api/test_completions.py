"""POST /v1/completions over a scripted engine: what OpenAI's clients count on."""

import json

import pytest

from service.api.openai.answers import Completion
from service.errors import EngineBusy, EngineDead, EngineStartFailed
from tests.support.scripted_engine import FinishReason, Script, ScriptedStarter
from tests.support.scripted_server import scripted_server


@pytest.fixture
def server(tmp_path):
    with scripted_server(tmp_path, max_choices=8) as running:
        yield running


def complete(client, **body):
    return client.post("/v1/completions", json={"model": "paper", "prompt": "hi", **body})


def usage(prompt_tokens, completion_tokens, cached_tokens=0):
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def frames(text: str) -> list[str]:
    """The data of each event; anything that is not an event fails."""
    parts = text.split("\n\n")
    assert parts[-1] == ""
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [part.removeprefix("data: ") for part in parts[:-1]]


def test_an_answer_has_text_reason_and_usage(server):
    """The whole answer, field by field."""
    answer = complete(server[0]).json()
    assert answer["choices"] == [{"text": "Hello world", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"] == usage(2, 3)
    assert (answer["object"], answer["model"]) == ("text_completion", "paper")
    assert answer["id"].startswith("cmpl-")


def test_defaults_are_openais(server):
    """Left out and null mean: 16 tokens, temperature 1, top_p 1, no seed, one choice."""
    client, starter = server
    complete(client)
    complete(client, max_tokens=None, temperature=None, top_p=None, n=None, stop=None, seed=None, stream=None)
    for request in starter.engines[0].requests:
        sampling = request.sampling
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (16, 1.0, 1.0)
        assert (sampling.seed, sampling.stop, sampling.ignore_eos) == (None, (), False)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [(97, 98)]),
        (["a", "b"], [(97,), (98,)]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
        (None, [(256,)]),
    ],
)
def test_all_four_forms_of_a_prompt(server, prompt, expected):
    """Text, texts, token ids and lists of them reach the engine as token ids; null is where a text begins."""
    client, starter = server
    answer = complete(client, prompt=prompt).json()
    assert [request.prompt_token_ids for request in starter.engines[0].requests] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_choices_are_prompt_times_n_with_seeds_of_their_own(server):
    """Choice j of each prompt draws with seed + j, so n completions differ and repeat."""
    client, starter = server
    answer = complete(client, prompt=["a", "b"], n=3, seed=9).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    requests = starter.engines[0].requests
    assert [request.sampling.seed for request in requests] == [9, 10, 11, 9, 10, 11]
    assert [request.prompt_token_ids for request in requests] == [(97,)] * 3 + [(98,)] * 3
    assert answer["usage"] == usage(2, 18)


def test_seeds_at_the_edge_stay_in_range(server):
    """The largest and a negative seed are brought into 0..2^63-1."""
    client, starter = server
    complete(client, n=2, seed=(1 << 63) - 1)
    complete(client, seed=-1)
    assert [r.sampling.seed for r in starter.engines[0].requests] == [(1 << 63) - 1, 0, (1 << 63) - 1]


def test_a_cut_answer_says_length(server):
    """max_tokens ends the text with reason length; 0 needs no engine."""
    client, starter = server
    assert complete(client, max_tokens=1).json()["choices"][0] == {
        "text": "Hel",
        "index": 0,
        "logprobs": None,
        "finish_reason": "length",
    }
    empty = complete(client, max_tokens=0).json()
    assert (empty["choices"][0]["text"], empty["choices"][0]["finish_reason"]) == ("", "length")
    assert empty["usage"] == usage(2, 0)
    assert len(starter.engines[0].requests) == 1


def test_an_empty_nucleus_is_greedy(server):
    """top_p 0 leaves the likeliest token alone."""
    client, starter = server
    complete(client, top_p=0, temperature=1.5)
    sampling = starter.engines[0].requests[0].sampling
    assert (sampling.temperature, sampling.top_p) == (0.0, 1.0)


def test_a_stream_says_the_same_as_the_answer(server):
    """Chunks join to the text, the last one has the reason, [DONE] ends it, each fits its schema."""
    response = complete(server[0], stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = frames(response.text)
    assert done == "[DONE]"
    parsed = [Completion.model_validate_json(chunk, extra="forbid") for chunk in chunks]
    assert "".join(chunk.choices[0].text for chunk in parsed) == "Hello world"
    assert [chunk.choices[0].finish_reason for chunk in parsed] == [None, None, "stop"]
    assert len({chunk.id for chunk in parsed}) == 1
    assert all("usage" not in json.loads(chunk) for chunk in chunks)


def test_a_stream_ends_with_usage_if_asked(server):
    """include_usage adds one chunk without choices; the others carry null."""
    response = complete(server[0], stream=True, n=2, stream_options={"include_usage": True})
    *chunks, last, done = [json.loads(f) if f != "[DONE]" else f for f in frames(response.text)]
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"] == usage(2, 6)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}


def test_usage_on_every_chunk_if_asked(server):
    """continuous_usage_stats counts along."""
    response = complete(server[0], stream=True, stream_options={"continuous_usage_stats": True})
    chunks = [json.loads(frame) for frame in frames(response.text)[:-1]]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineBusy("full", retry_after_seconds=1), 429, "engine_busy"),
        (EngineDead("gone", retry_after_seconds=2), 503, "engine_dead"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_a_status_even_for_streams(tmp_path, error, status, code, stream):
    """What is known before the first token is told by the status, with when to come back."""
    with scripted_server(tmp_path, ScriptedStarter(Script(refusal=error))) as (client, _):
        response = complete(client, stream=stream)
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert int(response.headers["retry-after"]) >= 1
        page = client.get("/metrics").text
    expected = "1.0" if status == 429 else "0.0"
    assert f'onebit_admission_rejections_total{{model="paper"}} {expected}' in page


def test_a_failure_in_a_stream_is_an_event(tmp_path):
    """After the first chunk a failure is told as an error event, then [DONE]."""
    script = Script(pieces=("one", "two"), failure=EngineDead("the engine process ended"))
    with scripted_server(tmp_path, ScriptedStarter(script)) as (client, _):
        response = complete(client, stream=True)
        *_, error, done = frames(response.text)
        assert response.status_code == 200
        assert done == "[DONE]"
        assert json.loads(error)["error"] == {
            "message": "the engine process ended",
            "type": "server_error",
            "param": None,
            "code": "engine_dead",
        }
        assert complete(client).status_code == 503


def test_a_failed_sequence_is_a_500_with_its_sentence(tmp_path):
    """A NaN in one sequence fails that request, and counts as an error."""
    script = Script(pieces=("x",), finish=FinishReason.ERROR)
    with scripted_server(tmp_path, ScriptedStarter(script)) as (client, _):
        response = complete(client)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "generation_failed"
        assert "NaN" in response.json()["error"]["message"]
        page = client.get("/metrics").text
    assert 'onebit_request_success_total{finished_reason="error",model="paper"} 1.0' in page


def test_one_failed_choice_ends_the_others(tmp_path):
    """When one of n fails the request fails, and nothing goes on in the engine."""
    script = Script(pieces=("x",), failure=EngineStartFailed("odd"))
    with scripted_server(tmp_path, ScriptedStarter(script)) as (client, starter):
        assert complete(client, n=4).status_code == 500
        assert client.get("/admin/models").json()["data"][0]["leases"] == 0
    assert len(starter.engines[0].requests) == 4


def test_tokens_and_ends_are_counted(server):
    """Each request moves the counters by what it cost."""
    client, _ = server
    complete(client, n=2)
    page = client.get("/metrics").text
    assert 'onebit_prompt_tokens_total{model="paper"} 4.0' in page
    assert 'onebit_generation_tokens_total{model="paper"} 6.0' in page
    assert 'onebit_request_success_total{finished_reason="stop",model="paper"} 2.0' in page
    assert 'onebit_time_to_first_token_seconds_count{model="paper"} 2.0' in page
    assert 'onebit_inter_token_latency_seconds_count{model="paper"} 4.0' in page
    assert 'onebit_http_requests_total{method="POST",route="/v1/completions",status="200"} 1.0' in page
