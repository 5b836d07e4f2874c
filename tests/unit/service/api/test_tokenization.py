"""The tokenizer and small questions over HTTP."""

import pytest

import onebit_core
from service.engine.types import EngineStats
from tests.support.scripted_server import scripted_server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with scripted_server(tmp_path_factory.mktemp("server")) as running:
        yield running


def test_text_becomes_tokens_and_text_again(server):
    """Without a model's name, where one is served; an empty text has no tokens."""
    client, _ = server
    answer = client.post("/tokenize", json={"prompt": "hé<|im_end|>", "return_token_strs": True}).json()
    assert answer == {
        "count": 4,
        "max_model_len": 64,
        "tokens": [104, 0xC3, 0xA9, 258],
        "token_strs": ["h", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"],
    }
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "hé<|im_end|>"}
    empty = client.post("/tokenize", json={"model": "paper", "prompt": ""}).json()
    assert (empty["count"], empty["tokens"], empty["token_strs"]) == (0, [], None)
    assert client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_a_conversation_is_tokenized_as_chat_does(server):
    """The same tokens that a chat completion sends to the engine."""
    client, starter = server
    messages = [{"role": "user", "content": "hi"}]
    client.post("/v1/chat/completions", json={"model": "paper", "messages": messages})
    tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert tuple(tokens) == starter.engines[0].requests[-1].prompt_token_ids
    closed = client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    assert tokens[: len(closed)] == closed
    assert len(closed) < len(tokens)


def test_the_tokenizer_describes_itself(server):
    """What evaluation tools ask before they begin."""
    answer = server[0].get("/tokenizer_info", params={"model": "paper"}).json()
    assert (answer["eos_token"], answer["bos_token"], answer["vocab_size"]) == ("<|endoftext|>", None, 259)
    assert "<|im_start|>" in answer["chat_template"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, None),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, 400, None),
        ("/tokenize", {"prompt": 3}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "extra": 1}, 400, "extra"),
        ("/detokenize", {"tokens": [320]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": "ab"}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
    ],
)
def test_bad_questions_are_told_by_name(server, path, body, status, param):
    """The same envelope as everywhere."""
    response = server[0].post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


def test_small_questions(server):
    """Version, life and load."""
    client, starter = server
    assert client.get("/version").json() == {"version": onebit_core.__version__}
    assert client.get("/ping").json() == {"status": "ok"}
    starter.engines[0].stats = EngineStats(num_running=2, num_waiting=3)
    assert client.get("/load").json() == {"server_load": 5}
    starter.engines[0].is_alive = False
    assert client.get("/ping").status_code == 503
    starter.engines[0].is_alive = True
