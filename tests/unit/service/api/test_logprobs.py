"""Log probabilities, echo and best_of over a scripted engine: every number is known beforehand."""

import json
import math

import pytest
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing

from service.api.openai.answers import ChatCompletion, ChatCompletionChunk, Completion
from tests.support.scripted_engine import Script, ScriptedStarter
from tests.support.scripted_server import scripted_server

EOS = 256


def serve(folder, script):
    return scripted_server(folder, ScriptedStarter(script, max_model_len=256), max_choices=8)


def complete(client, **body):
    response = client.post("/v1/completions", json={"model": "paper", "prompt": "hi", **body})
    assert response.status_code == 200, response.text
    return response


def chat(client, **body):
    messages = [{"role": "user", "content": "hi"}]
    return client.post("/v1/chat/completions", json={"model": "paper", "messages": messages, **body})


def chunks_of(response):
    lines = response.text.split("\n\n")[:-2]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def joined(lists):
    """One object of four lists out of many."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [entry for each in lists for entry in each[name]] for name in names}


@pytest.fixture
def words(tmp_path):
    """A model that says "abc" byte by byte and ends."""
    script = Script(pieces=("a", "b", "c", ""), token_ids=(*b"abc", EOS))
    with serve(tmp_path, script) as running:
        yield running


def test_four_lists_say_token_logprob_rivals_and_place(words):
    """The k most probable tokens and the one that was drawn; the end of sequence is a token without text."""
    answer = Completion.model_validate_json(complete(words[0], logprobs=2).text, extra="forbid")
    told = answer.choices[0].logprobs
    assert told.tokens == ["a", "b", "c", "<|endoftext|>"]
    assert told.token_logprobs == [-0.5, -1.0, -1.5, -2.0]
    assert told.text_offset == [0, 1, 2, 3]
    assert told.top_logprobs[0] == {"A": -0.25, "a": -0.5}
    assert words[1].engines[0].requests[0].sampling.logprobs == 2


def test_logprobs_zero_tell_the_drawn_token_alone(words):
    """Zero is not the same as none."""
    told = complete(words[0], logprobs=0).json()["choices"][0]["logprobs"]
    assert told["top_logprobs"] == [{"a": -0.5}, {"b": -1.0}, {"c": -1.5}, {"<|endoftext|>": -2.0}]
    assert complete(words[0]).json()["choices"][0]["logprobs"] is None


def test_one_rival_and_the_drawn_token_are_two_entries(words):
    """The drawn token is told even if it is not among the k."""
    told = complete(words[0], logprobs=1).json()["choices"][0]["logprobs"]
    assert told["top_logprobs"][1] == {"A": -0.75, "b": -1.0}


def test_echo_puts_the_prompt_first(words):
    """Text, tokens and offsets begin with the prompt, whose first token has no probability."""
    choice = complete(words[0], prompt="h<|im_start|>é", echo=True, logprobs=1).json()["choices"][0]
    assert choice["text"] == "h<|im_start|>éabc"
    told = choice["logprobs"]
    assert told["tokens"][:4] == ["h", "<|im_start|>", "bytes:\\xc3", "bytes:\\xa9"]
    assert told["token_logprobs"][:5] == [None, -1.0, -2.0, -3.0, -0.5]
    assert told["top_logprobs"][0] is None
    assert told["text_offset"] == [0, 1, 13, 13, 14, 15, 16, 17]


@pytest.mark.parametrize(("text", "expected"), [("h<|im_end|>i", [0, 0, 1, 11, 12]), ("ab", [0, 0, 1, 2])])
def test_tokens_that_the_tokenizer_adds_take_no_room(words, text, expected):
    """They are told with the others, but are not in the text."""
    client, _ = words
    backend = client.app.state.registry.get("paper").tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 257), ("<|im_end|>", 258)]
    )
    choice = complete(client, prompt=text, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert choice["text"] == text
    assert choice["logprobs"]["text_offset"] == expected
    assert (choice["logprobs"]["tokens"][0], choice["logprobs"]["tokens"][-1]) == ("<|im_start|>", "<|im_end|>")


def test_a_tokenizer_that_changes_the_text_tells_its_own_offsets(words):
    """The text comes back as it was sent."""
    client, _ = words
    client.app.state.registry.get("paper").tokenizer.backend_tokenizer.normalizer = Lowercase()
    choice = complete(client, prompt="AB c", echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert choice["text"] == "AB c"
    assert choice["logprobs"]["tokens"] == ["a", "b", " ", "c"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


def test_echo_of_token_ids_is_what_they_write(words):
    """Special tokens included, and a character in pieces is one character."""
    choice = complete(words[0], prompt=[104, 257, 0xC3, 0xA9], echo=True, logprobs=0).json()["choices"][0]
    assert choice["text"] == "h<|im_start|>éabc"
    assert choice["logprobs"]["text_offset"] == [0, 1, 13, 13, 14, 15, 16, 17]


def test_echo_without_tokens_scores_the_prompt(words):
    """max_tokens 0 with echo and logprobs is scoring; without logprobs no engine is needed."""
    client, starter = words
    choice = complete(client, echo=True, logprobs=0, max_tokens=0).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0]
    assert starter.engines[0].requests[0].sampling.max_tokens == 0
    assert complete(client, echo=True, max_tokens=0).json()["choices"][0]["text"] == "hi"
    assert len(starter.engines[0].requests) == 1


@pytest.mark.parametrize("echo", [False, True])
def test_a_stream_tells_the_same_numbers_in_order(tmp_path, echo):
    """Tokens whose text is held back come with a later chunk; joined they are the whole answer's."""
    script = Script(pieces=("", "", "€", "", "", "xy"), token_ids=(0xE2, 0x82, 0xAC, 120, 121, EOS))
    with serve(tmp_path, script) as (client, _):
        whole = complete(client, logprobs=3, echo=echo).json()["choices"][0]
        chunks = chunks_of(complete(client, logprobs=3, echo=echo, stream=True))
    for chunk in chunks:
        Completion.model_validate(chunk, extra="forbid")
    assert joined([chunk["choices"][0]["logprobs"] for chunk in chunks]) == whole["logprobs"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert len(chunks) == 2 + echo
    shift = 2 * echo
    assert whole["logprobs"]["text_offset"][shift:] == [shift, shift, shift, shift + 1, shift + 2, shift + 3]


def test_chat_tells_tokens_with_their_bytes(words):
    """One object a token, with the most probable ones as many as asked for."""
    answer = ChatCompletion.model_validate_json(chat(words[0], logprobs=True, top_logprobs=2).text, extra="forbid")
    content = answer.choices[0].logprobs.content
    assert [(entry.token, entry.logprob, entry.bytes) for entry in content[:2]] == [
        ("a", -0.5, [97]),
        ("b", -1.0, [98]),
    ]
    assert [entry.token for entry in content[0].top_logprobs] == ["A", "a"]
    bare = chat(words[0], logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in bare] == [[], [], [], []]
    assert chat(words[0]).json()["choices"][0]["logprobs"] is None


def test_a_chat_stream_tells_the_same(words):
    """Joined chunks have every token once, and fit their schema."""
    whole = chat(words[0], logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    chunks = chunks_of(chat(words[0], logprobs=True, top_logprobs=1, stream=True))
    told = []
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, extra="forbid")
        told += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    assert told == whole


def test_an_impossible_token_is_told_in_json(tmp_path):
    """The logarithm of zero is written as -9999."""
    with serve(tmp_path, Script(pieces=("a",), scores=lambda _draw, _place: -math.inf)) as (client, _):
        assert complete(client, logprobs=0).json()["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_prompt_logprobs_are_by_token_id(words):
    """As vLLM writes them: the token itself, then the most probable, with ranks."""
    choice = complete(words[0], prompt_logprobs=1).json()["choices"][0]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "105": {"logprob": -1.0, "rank": None, "decoded_token": "i"},
            "65": {"logprob": -0.75, "rank": 1, "decoded_token": "A"},
        },
    ]
    answer = chat(words[0], prompt_logprobs=0).json()
    assert answer["prompt_logprobs"][0] is None
    assert "prompt_logprobs" not in answer["choices"][0]


def test_token_ids_are_returned_if_asked(words):
    """Of prompt and completion; in a stream the prompt's once per choice."""
    client, _ = words
    choice = complete(client, return_token_ids=True).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([104, 105], [97, 98, 99, EOS])
    chunks = chunks_of(complete(client, return_token_ids=True, stream=True))
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[97], [98], [99], [EOS]]
    assert ["prompt_token_ids" in chunk["choices"][0] for chunk in chunks] == [True, False, False, False]
    answer = chat(client, return_token_ids=True).json()
    assert answer["prompt_token_ids"][0] == 257
    assert answer["choices"][0]["token_ids"] == [97, 98, 99, EOS]
    streamed = chunks_of(chat(client, return_token_ids=True, stream=True))
    assert streamed[0]["prompt_token_ids"] == answer["prompt_token_ids"]
    assert [token for chunk in streamed[1:] for token in chunk["choices"][0]["token_ids"]] == [97, 98, 99, EOS]


def test_the_best_of_many_are_returned(tmp_path):
    """Of each prompt's draws those with the highest mean log probability, best first; all are paid for."""
    means = [-3.0, -1.0, -2.0, -0.5, -4.0, -0.25]
    with serve(tmp_path, Script(pieces=("x", "y"), scores=lambda draw, _place: means[draw])) as (client, starter):
        answer = complete(client, prompt=["a", "b"], best_of=3, n=2, seed=7, return_token_ids=True, logprobs=0).json()
    requests = starter.engines[0].requests
    assert [request.sampling.seed for request in requests] == [7, 8, 9, 7, 8, 9]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    told = [choice["logprobs"]["token_logprobs"][0] for choice in answer["choices"]]
    assert told == [-1.0, -2.0, -0.25, -0.5]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[97], [97], [98], [98]]
    assert answer["usage"]["completion_tokens"] == 12


def test_best_of_ranks_without_showing(tmp_path):
    """The engine is asked for log probabilities only to compare; best_of equal to n compares nothing."""
    with serve(tmp_path, Script()) as (client, starter):
        assert complete(client, best_of=2).json()["choices"][0]["logprobs"] is None
        complete(client, best_of=2, n=2, stream=True)
        asked = [request.sampling.logprobs for request in starter.engines[0].requests]
    assert asked == [0, 0, None, None]


def test_cached_tokens_are_counted_once_for_a_prompt(tmp_path):
    """Of n completions of a prompt the first tells what was cached."""
    with serve(tmp_path, Script(num_cached=1)) as (client, _):
        usage = complete(client, prompt=["ab", "cd"], n=2).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert usage["prompt_tokens"] == 4
