"""The real server process and the real `openai` package: everything a client does, streaming and not."""

import openai
import pytest
import torch

from onebit_core.artifact.reader import load_model

pytestmark = pytest.mark.acceptance


@pytest.fixture
def server(openai_server):
    return openai_server


@pytest.fixture
def client(openai_client):
    return openai_client


def greedy(artifact, prompt: str, max_new_tokens: int) -> str:
    """What transformers' own loop makes of the artifact."""
    loaded = load_model(artifact)
    token_ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    made = loaded.model.generate(
        token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=max_new_tokens, do_sample=False
    )
    return loaded.tokenizer.decode(made[0, token_ids.shape[1] :], skip_special_tokens=True)


def test_models_are_listed(client):
    """The artifact is served under its manifest's name."""
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_a_completion_is_what_transformers_generates(client, tiny_artifact):
    """Greedy text equals generate() on the same artifact."""
    answer = client.completions.create(model="tiny", prompt="hello world", max_tokens=12, temperature=0)
    assert answer.choices[0].text == greedy(tiny_artifact, "hello world", 12)
    assert answer.usage.prompt_tokens == len("hello world")
    assert answer.usage.completion_tokens <= 12


def test_a_stream_joins_to_the_same_text(client):
    """Chunks of a stream are the whole answer in pieces, with usage at the end."""
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_many_prompts_and_choices_in_one_request(client):
    """Each prompt gets n completions in order; greedy ones are all alike."""
    answer = client.completions.create(model="tiny", prompt=["one", "two"], n=2, max_tokens=6, temperature=0)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    single = client.completions.create(model="tiny", prompt="two", max_tokens=6, temperature=0)
    assert texts[2] == single.choices[0].text


def test_token_ids_and_text_are_the_same_prompt(client):
    """The tiny tokenizer's ids are bytes."""
    asked = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    text = client.completions.create(prompt="abc", **asked).choices[0].text
    assert client.completions.create(prompt=list(b"abc"), **asked).choices[0].text == text
    assert client.completions.create(prompt=[list(b"abc")], **asked).choices[0].text == text


def test_a_seed_repeats_a_draw(client):
    """Equal seeds give equal texts, alone or beside others; n draws differ."""
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 16, "temperature": 1.0, "extra_body": {"ignore_eos": True}}
    first = client.completions.create(**asked, seed=5).choices[0].text
    several = [choice.text for choice in client.completions.create(**asked, seed=4, n=3).choices]
    assert several[1] == first
    assert len(set(several)) == 3


def test_a_stop_text_ends_the_completion_and_is_left_out(client):
    """Generation stops where the text would begin."""
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "temperature": 0.9, "seed": 1}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[5]
    answer = client.completions.create(**asked, stop=[stop]).choices[0]
    assert answer.text == whole[: whole.index(stop)]
    assert answer.finish_reason == "stop"


def test_chat_answers_and_streams(client):
    """A conversation goes through the model's template; stream and answer agree."""
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert whole.message.role == chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content


@pytest.mark.parametrize(
    ("asked", "error", "code"),
    [
        ({"model": "other", "prompt": "x"}, openai.NotFoundError, "model_not_found"),
        ({"model": "tiny", "prompt": "x" * 600}, openai.BadRequestError, "context_length_exceeded"),
        ({"model": "tiny", "prompt": "x", "temperature": 3}, openai.BadRequestError, "invalid_value"),
        ({"model": "tiny", "prompt": "x", "suffix": "y"}, openai.BadRequestError, "unsupported_parameter"),
        ({"model": "tiny", "prompt": "x", "stream": True, "n": 200}, openai.BadRequestError, "invalid_value"),
    ],
)
def test_errors_arrive_as_the_packages_own_exceptions(client, asked, error, code):
    """Each refusal becomes the exception a caller of OpenAI expects, with a code to branch on."""
    with pytest.raises(error) as refused:
        client.completions.create(**asked)
    assert refused.value.code == code


def test_the_log_is_json_and_holds_no_prompt(server, client):
    """Every line the server and its children wrote parses, and none has what was asked."""
    client.completions.create(model="tiny", prompt="swordfish", max_tokens=1)
    lines = server.log()
    assert any(line["message"] == "request" for line in lines)
    assert "swordfish" not in server.log_file.read_text()
