"""Bad input: one clear sentence in OpenAI's envelope, 4xx, and never an echo of what was sent."""

import pytest

from tests.support.scripted_server import scripted_server

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with scripted_server(tmp_path_factory.mktemp("server"), max_body_bytes=100_000, max_choices=8) as (client, _):
        yield client


def post(client, content, path="/v1/completions"):
    return client.post(path, content=content, headers=JSON)


def check_envelope(response, status, code, param):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    assert "x-request-id" in response.headers


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ('"prompt": "x", "n": "1"', "invalid_value", "n"),
        ('"prompt": "x", "n": true', "invalid_value", "n"),
        ('"prompt": "x", "n": 0', "invalid_value", "n"),
        ('"prompt": "x", "n": 129', "invalid_value", "n"),
        ('"prompt": "x", "n": 9', "invalid_value", "n"),
        ('"prompt": "x", "n": 1.5', "invalid_value", "n"),
        ('"prompt": "x", "max_tokens": -1', "invalid_value", "max_tokens"),
        ('"prompt": "x", "max_tokens": 9223372036854775808', "invalid_value", "max_tokens"),
        ('"prompt": "x", "temperature": 2.1', "invalid_value", "temperature"),
        ('"prompt": "x", "temperature": -0.1', "invalid_value", "temperature"),
        ('"prompt": "x", "temperature": 1e999', "invalid_value", "temperature"),
        ('"prompt": "x", "top_p": 1.1', "invalid_value", "top_p"),
        ('"prompt": "x", "seed": 9223372036854775808', "invalid_value", "seed"),
        ('"prompt": "x", "seed": 1.0', "invalid_value", "seed"),
        ('"prompt": "x", "stop": ["a","b","c","d","e"]', "invalid_value", "stop"),
        ('"prompt": "x", "stop": ""', "invalid_value", "stop"),
        ('"prompt": "x", "stop": [1]', "invalid_value", "stop"),
        ('"prompt": "x", "stop": "\\udc00"', "invalid_value", "stop"),
        ('"prompt": "x", "stream_options": {"x": 1}', "unknown_parameter", "stream_options.x"),
        ('"prompt": "x", "stream_options": {"include_usage": true}', "invalid_value", "stream_options"),
        ('"prompt": ""', "invalid_value", "prompt"),
        ('"prompt": []', "invalid_value", "prompt"),
        ('"prompt": [[]]', "invalid_value", "prompt"),
        ('"prompt": [[1], []]', "invalid_value", "prompt"),
        ('"prompt": [1, "a"]', "invalid_value", "prompt"),
        ('"prompt": [true]', "invalid_value", "prompt"),
        ('"prompt": [1.5]', "invalid_value", "prompt"),
        ('"prompt": {"a": 1}', "invalid_value", "prompt"),
        ('"prompt": "\\ud800"', "invalid_value", "prompt"),
        ('"prompt": [320]', "invalid_value", "prompt"),
        ('"prompt": [-1]', "invalid_value", "prompt"),
        ('"prompt": [100000000000000000000000]', "invalid_value", "prompt"),
        ('"n": 1', "missing_required_parameter", "prompt"),
        ('"prompt": "x", "suffix": "y"', "unsupported_parameter", "suffix"),
        ('"prompt": "x", "use_beam_search": true', "unsupported_parameter", "use_beam_search"),
        ('"prompt": "x", "skip_special_tokens": false', "unsupported_parameter", "skip_special_tokens"),
        ('"prompt": "x", "bad_words": ["a"]', "unsupported_parameter", "bad_words"),
        ('"prompt": "x", "allowed_token_ids": [1]', "unsupported_parameter", "allowed_token_ids"),
        ('"prompt": "x", "length_penalty": 2', "unsupported_parameter", "length_penalty"),
        ('"prompt": "x", "max_completion_tokens": -1', "invalid_value", "max_completion_tokens"),
        ('"prompt": "x", "best_of": 21', "invalid_value", "best_of"),
        ('"prompt": "x", "best_of": 1, "n": 2', "invalid_value", "best_of"),
        ('"prompt": "x", "best_of": 2, "stream": true', "invalid_value", "best_of"),
        ('"prompt": "x", "best_of": 9', "invalid_value", "best_of"),
        ('"prompt": "x", "logprobs": -1', "invalid_value", "logprobs"),
        ('"prompt": "x", "logprobs": 6', "invalid_value", "logprobs"),
        ('"prompt": "x", "logprobs": true', "invalid_value", "logprobs"),
        ('"prompt": "x", "echo": 1', "invalid_value", "echo"),
        ('"prompt": "x", "presence_penalty": 2.1', "invalid_value", "presence_penalty"),
        ('"prompt": "x", "frequency_penalty": -2.1', "invalid_value", "frequency_penalty"),
        ('"prompt": "x", "frequency_penalty": false', "invalid_value", "frequency_penalty"),
        ('"prompt": "x", "logit_bias": [1]', "invalid_value", "logit_bias"),
        ('"prompt": "x", "logit_bias": {"a": 1}', "invalid_value", "logit_bias"),
        ('"prompt": "x", "logit_bias": {"01": 1}', "invalid_value", "logit_bias"),
        ('"prompt": "x", "logit_bias": {"-1": 1}', "invalid_value", "logit_bias"),
        ('"prompt": "x", "logit_bias": {"1": 101}', "invalid_value", "logit_bias"),
        ('"prompt": "x", "logit_bias": {"1": true}', "invalid_value", "logit_bias"),
        ('"prompt": "x", "logit_bias": {"320": 1}', "invalid_value", "logit_bias"),
        ('"prompt": "x", "top_k": -2', "invalid_value", "top_k"),
        ('"prompt": "x", "min_p": 1.5', "invalid_value", "min_p"),
        ('"prompt": "x", "repetition_penalty": 0', "invalid_value", "repetition_penalty"),
        ('"prompt": "x", "repetition_penalty": 1e300', "invalid_value", "repetition_penalty"),
        ('"prompt": "x", "min_tokens": 17', "invalid_value", "min_tokens"),
        ('"prompt": "x", "min_tokens": 3, "max_tokens": 2', "invalid_value", "min_tokens"),
        ('"prompt": "x", "stop_token_ids": [320]', "invalid_value", "stop_token_ids"),
        ('"prompt": "x", "stop_token_ids": ["a"]', "invalid_value", "stop_token_ids.0"),
        ('"prompt": "x", "prompt_logprobs": 21', "invalid_value", "prompt_logprobs"),
        ('"prompt": "x", "prompt_logprobs": 1, "stream": true', "invalid_value", "prompt_logprobs"),
        ('"prompt": "x", "truncate_prompt_tokens": 0', "invalid_value", "truncate_prompt_tokens"),
        ('"prompt": "x", "priority": 2147483648', "invalid_value", "priority"),
        ('"prompt": "x", "cache_salt": ""', "invalid_value", "cache_salt"),
        ('"prompt": "x", "response_format": {"type": "xml"}', "invalid_value", "response_format.type"),
        (
            '"prompt": "x", "response_format": {"type": "json_schema"}',
            "invalid_value",
            "response_format.json_schema",
        ),
        ('"prompt": "x", "structured_outputs": {}', "invalid_value", "structured_outputs"),
        (
            '"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["b"]}',
            "invalid_value",
            "structured_outputs",
        ),
        ('"prompt": "x", "structured_outputs": {"choice": ["\\u0000"]}', "invalid_value", "structured_outputs.choice"),
        ('"prompt": "x", "structured_outputs": {"regex": "(("}', "invalid_value", "structured_outputs"),
        ('"prompt": "x", "structured_outputs": {"grammar": "x ::= y"}', "invalid_value", "structured_outputs"),
        ('"prompt": "x", "structured_outputs": {"json": "[1"}', "invalid_value", "structured_outputs"),
        ('"prompt": "x", "structured_outputs": {"choice": []}', "invalid_value", "structured_outputs.choice"),
        (
            '"prompt": "x", "response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}',
            "invalid_value",
            "structured_outputs",
        ),
        ('"prompt": "x", "tempreature": 1', "unknown_parameter", "tempreature"),
        ('"prompt": "x", "int": 1', "unknown_parameter", "int"),
        ('"prompt": "x", "top_p[0]": 1', "unknown_parameter", "top_p[0]"),
        ('"prompt": "x", "\\ud800": 1', "invalid_value", None),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(client, fields, code, param):
    """Wrong type, out of bounds, unknown, unsupported: each is told by name."""
    check_envelope(post(client, '{"model": "paper", ' + fields + "}"), 400, code, param)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'"x"',
        b"null",
        b"\xff\xfe{}",
        b'{"model": "paper", "prompt": "x", "temperature": NaN}',
        b'{"model": "paper", "prompt": "x", "user": Infinity}',
        b'{"model": "paper", "prompt": "x", "metadata": {"a": -Infinity}}',
        b'{"n": ' + b"1" * 5000 + b"}",
        b"[" * 30_000,
        b'{"a":' * 10_000,
    ],
)
def test_what_is_not_a_json_object_is_a_400(client, content):
    """Broken, deep, wrongly encoded and non-standard JSON never reach a handler, nor a 500."""
    check_envelope(post(client, content), 400, "invalid_json", None)


def test_another_content_type_is_a_400(client):
    """A form, or no type at all, is not JSON."""
    for headers in ({}, {"content-type": "text/plain"}):
        response = client.post("/v1/completions", content=b'{"model": "paper", "prompt": "x"}', headers=headers)
        check_envelope(response, 400, "invalid_json", None)


def test_what_was_sent_is_not_repeated(client):
    """An error may be logged by a proxy, so it holds no value of the request."""
    secret = "correct-horse-battery"
    for body in (f'{{"model": "paper", "prompt": {{"{secret}": "{secret}"}}}}', f'{{"n": "{secret}"}}', f'"{secret}"'):
        assert secret not in post(client, body).text


def test_a_prompt_that_does_not_fit_is_told_so(client):
    """Context length is its own code; an explicit max_tokens must fit, the default is cut."""
    check_envelope(
        post(client, '{"model": "paper", "prompt": "' + "x" * 64 + '"}'), 400, "context_length_exceeded", "prompt"
    )
    check_envelope(
        post(client, '{"model": "paper", "prompt": "xx", "max_tokens": 63}'), 400, "context_length_exceeded", "prompt"
    )
    assert post(client, '{"model": "paper", "prompt": "' + "x" * 60 + '"}').status_code == 200


@pytest.mark.parametrize("name", ["other", "../paper", "/etc/passwd", "paper\\u0000", "x" * 256])
def test_an_unknown_model_is_a_404(client, name):
    """A model's name is looked up, never used as a path."""
    response = post(client, '{"model": "' + name + '", "prompt": "x"}')
    check_envelope(response, 404, "model_not_found", "model")


def test_a_body_over_the_limit_is_a_413(client):
    """Announced or not, a large body is refused before it is all read."""
    check_envelope(post(client, b"x" * 100_001), 413, "payload_too_large", None)
    sent = []

    def pieces():
        for _ in range(100):
            sent.append(1)
            yield b" " * 10_000

    check_envelope(post(client, pieces()), 413, "payload_too_large", None)


def test_unknown_paths_and_methods_have_the_envelope(client):
    """404 and 405 of the framework look like everything else."""
    check_envelope(client.get("/v2/nothing"), 404, "path_not_found", None)
    check_envelope(client.get("/v1/completions"), 405, "method_not_allowed", None)
    check_envelope(client.post("/v1/completions/"), 404, "path_not_found", None)


def test_harmless_values_of_unsupported_fields_pass(client):
    """Clients that always send everything still work."""
    body = (
        '{"model": "paper", "prompt": "x", "best_of": 1, "echo": false, "logprobs": null, "suffix": null,'
        '"logit_bias": {}, "presence_penalty": 0.0, "frequency_penalty": 0, "user": "u", "store": true,'
        '"metadata": {"a": "b"}, "service_tier": "auto", "top_k": -1, "length_penalty": 1.0, "bad_words": [],'
        '"response_format": {"type": "text"}, "use_beam_search": false, "skip_special_tokens": true}'
    )
    assert post(client, body).status_code == 200


def test_arrivals_of_nonsense_make_no_new_series(client):
    """Labels hold routes and known methods, never what was sent."""
    for path in ("/a", "/b/c", "/v1/models/some-name"):
        client.get(path)
    client.request("BREW", "/v1/models")
    page = client.get("/metrics").text
    assert "some-name" not in page
    assert "BREW" not in page
    assert 'route="/v1/models/{name:path}"' in page
