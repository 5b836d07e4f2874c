"""lm-eval asks our server what it asks a model in process, and gets the same answers and the same score.

Its client `local-completions` takes the tokenizer from the server too (/tokenizer_info, /tokenize), sends token ids
with `echo` and `logprobs`, and reads the arrays of the legacy completions API: what few servers can answer.
"""

import json
from importlib.util import find_spec

import pytest

from onebit_core.artifact.reader import load_model
from tests.support.server_process import running_server

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:.*:Warning:lm_eval", "ignore:.*:Warning:datasets", "ignore::ResourceWarning"),
    pytest.mark.skipif(
        find_spec("lm_eval") is None or find_spec("tenacity") is None,
        reason="lm-eval and tenacity (extra `zeroshot`) are not installed",
    ),
]

QUESTIONS = [
    {"question": f"What is {n} and {n}?", "choices": [str(2 * n), str(n), f"{n} {n} or more"], "gold": n % 3}
    for n in range(1, 31)
]
LOG_LIKELIHOOD_ERROR = 2e-3
"""Nats of a whole continuation; the server computes in batches, and with a cache."""


@pytest.fixture(scope="module")
def server(tiny_artifact, tmp_path_factory):
    log_file = tmp_path_factory.mktemp("server") / "log"
    with running_server(str(tiny_artifact), "--kv-cache-bytes", "8000000", log_file=log_file) as server:
        yield server


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of lm-eval, made from a file of questions."""
    from onebit_core.evaluation.zero_shot import load_tasks

    file = tmp_path_factory.mktemp("task") / "sums.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return load_tasks({"sums": str(file)})["sums"]


def client(server):
    """lm-eval's client, which finds out about the tokenizer by itself."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=server.url + "/v1/completions", model="tiny", num_concurrent=4, batch_size=3, max_length=512
    )


def test_the_client_takes_the_tokenizer_from_the_server(server, tiny_artifact):
    """It finds the tokenizer's routes, and encodes and decodes with them as the artifact's own tokenizer does."""
    asking = client(server)
    assert asking.tokenizer_backend == "remote"
    tokenizer = load_model(tiny_artifact).tokenizer
    text = "What is 12 and 12? Grüße"
    assert list(asking.tok_encode(text)) == tokenizer(text)["input_ids"]
    assert asking.eot_token_id == tokenizer.eos_token_id


def test_every_log_likelihood_is_that_of_the_model_in_process(server, task, tiny_artifact):
    """Each choice after each question: the sum of log probabilities, and whether greedy decoding would write it."""
    from onebit_core.evaluation.zero_shot import ScoringModel, ask

    loaded = load_model(tiny_artifact)
    requests = [request for index in range(len(QUESTIONS)) for request in ask(task, index).requests]
    by_http = client(server).loglikelihood(requests, disable_tqdm=True)
    in_process = ScoringModel(loaded.model, loaded.tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert len(by_http) == 3 * len(QUESTIONS)
    for (log, is_greedy), (expected, expected_greedy) in zip(by_http, in_process, strict=True):
        assert log == pytest.approx(expected, abs=LOG_LIKELIHOOD_ERROR)
        assert is_greedy == expected_greedy


def test_lm_eval_scores_the_server_as_it_scores_the_model(server, task, tiny_artifact):
    """The whole of lm-eval over HTTP, against our own evaluation of the artifact."""
    import lm_eval

    from onebit_core.evaluation.zero_shot import evaluate_task

    loaded = load_model(tiny_artifact)
    expected = evaluate_task("sums", task, (loaded.model, loaded.model), loaded.tokenizer)
    scored = lm_eval.simple_evaluate(model=client(server), tasks=[task], bootstrap_iters=0)["results"]["sums"]
    assert scored["acc,none"] == pytest.approx(expected.compressed.value)
    assert scored["acc_norm,none"] == pytest.approx(expected.compressed_norm.value)
