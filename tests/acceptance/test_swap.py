"""Models change under load on the real server: real openai clients see no error and no mixed answer."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from tests.support.quantized import quantize_tiny
from tests.support.server_process import running_server
from tests.support.tiny_model import save_tiny_model

pytestmark = pytest.mark.acceptance

SWAPS = 4
TOKENS = 48
PROMPT = "the same prompt"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two artifacts of one name, from different models, and room for the server's record."""
    root = tmp_path_factory.mktemp("root")
    for name, seed in (("blue", 1), ("green", 2)):
        model = save_tiny_model(tmp_path_factory.mktemp("model") / name, seed=seed)
        quantize_tiny(model, root / name, name="served")
    return root


@pytest.fixture
def server(root, tmp_path):
    arguments = (str(root / "blue"), "--artifact-root", str(root), "--no-jobs-enabled", "--no-restore-models")
    with running_server(*arguments, "--kv-cache-bytes", "8000000", log_file=tmp_path / "log") as server:
        yield server


def admin(server, method, path, body=None):
    answer = httpx2.request(method, server.url + "/admin" + path, json=body, timeout=120)
    return answer.status_code, answer.json()


def say(server, model="served", **options):
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    return client.completions.create(model=model, prompt=PROMPT, max_tokens=TOKENS, temperature=0, **options)


def text_of(answer) -> str:
    return answer.choices[0].text


def states(server) -> list[str]:
    return [model["state"] for model in admin(server, "GET", "/models")[1]["data"]]


def wait_for(is_true, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Crowd:
    """Clients that stream one answer after another until told to stop; what they saw is kept."""

    def __init__(self, server, num_clients: int) -> None:
        self.texts: list[str] = []
        self.errors: list[Exception] = []
        self._server = server
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_clients)]

    def _ask(self) -> None:
        client = openai.OpenAI(base_url=self._server.url + "/v1", api_key="none", max_retries=0)
        while not self._stop.is_set():
            try:
                stream = client.completions.create(
                    model="served", prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
                )
                self.texts.append("".join(chunk.choices[0].text for chunk in stream if chunk.choices))
            except openai.OpenAIError as error:
                self.errors.append(error)
            time.sleep(0.05)  # leaves a small machine some of its time to load models

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)


def test_swaps_under_load_fail_no_request(server):
    """Every stream is whole and of one model; both models answered; in the end one engine is left."""
    expected = {"blue": text_of(say(server))}
    with Crowd(server, 3) as crowd:
        for number in range(SWAPS):
            path = ("green", "blue")[number % 2]
            status, model = admin(server, "POST", "/models/swap", {"name": "served", "path": path})
            assert (status, model["state"]) == (200, "ready"), model
            assert model["path"].endswith(path)
            assert model["golden"]["error_nats"] < 0.03
            expected.setdefault(path, text_of(say(server)))
            assert text_of(say(server)) == expected[path]  # whoever asks after the answer gets the new one
    assert crowd.errors == []
    assert expected["blue"] != expected["green"]
    assert set(crowd.texts) == set(expected.values())
    assert len(crowd.texts) > 3 * SWAPS
    wait_for(lambda: states(server) == ["ready"])
    page = httpx2.get(server.url + "/metrics").text
    assert page.count("onebit_engine_info{") == 1
    assert 'onebit_request_success_total{finished_reason="error",model="served"} 0.0' in page


def test_an_old_request_ends_on_the_old_model(server):
    """A stream that began before the swap is finished by the model that began it, and the name is the new one's."""
    before = text_of(say(server, logit_bias={"256": -100}))
    stream = say(server, stream=True, logit_bias={"256": -100}, extra_body={"ignore_eos": True})
    pieces = [next(stream).choices[0].text]
    assert admin(server, "POST", "/models/swap", {"name": "served", "path": "green"})[0] == 200
    assert text_of(say(server, logit_bias={"256": -100})) != before
    pieces += [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(pieces) == before
    wait_for(lambda: states(server) == ["ready"])


def test_an_artifact_that_fails_its_golden_prompts_is_not_swapped_in(server, root):
    """The served one goes on, whatever is wrong with the other."""
    damaged = shutil.copytree(root / "green", root / "damaged")
    try:
        before = text_of(say(server))
        manifest = json.loads((damaged / "manifest.json").read_text())
        (damaged / "manifest.json").write_text(json.dumps({**manifest, "golden_sha256": "0" * 64}))
        status, answer = admin(server, "POST", "/models/swap", {"name": "served", "path": "damaged"})
        assert (status, answer["error"]["type"]) == (500, "server_error")
        assert "golden.json" in answer["error"]["message"]
        assert text_of(say(server)) == before
        assert states(server) == ["ready"]
    finally:
        shutil.rmtree(damaged)


def test_unloading_first_is_a_short_503(server):
    """Requests are told when to come back, and the openai client does so by itself."""
    seen, cards = [], []

    def knock():
        while not seen or seen[-1].status_code != 200 or len(seen) < 3:
            body = {"model": "served", "prompt": PROMPT, "max_tokens": 1}
            seen.append(httpx2.post(server.url + "/v1/completions", json=body, timeout=60))
            cards.append(httpx2.get(server.url + "/v1/models/served", timeout=60))
            time.sleep(0.05)

    swapping = threading.Thread(
        target=admin, args=(server, "POST", "/models/swap", {"name": "served", "path": "green", "unload_first": True})
    )
    swapping.start()
    wait_for(lambda: "loading" in states(server))
    thread = threading.Thread(target=knock)
    thread.start()
    patient = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=20)
    assert patient.completions.create(model="served", prompt=PROMPT, max_tokens=1).choices
    swapping.join(60)
    thread.join(60)
    assert {answer.status_code for answer in seen} == {200, 503}
    refused = next(answer for answer in seen if answer.status_code == 503)
    assert refused.json()["error"]["code"] == "model_loading"
    assert int(refused.headers["retry-after"]) > 0
    assert {answer.status_code for answer in cards} == {200, 404}  # like the list, which has none that does not answer


def engine_pid(server) -> int:
    (engine,) = [child for child in psutil.Process(server.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    return engine.pid


@pytest.mark.parametrize("how", ["overwritten", "cut short", "deleted", "replaced"])
def test_files_that_change_under_a_served_model_do_not_change_it(root, tmp_path, how):
    """What is loaded goes on; after a crash the engine refuses the other files, and a swap takes them."""
    home = tmp_path / "home"
    shutil.copytree(root / "blue", home / "blue")
    arguments = (str(home / "blue"), "--artifact-root", str(home), "--no-jobs-enabled", "--no-restore-models")
    with running_server(*arguments, "--kv-cache-bytes", "8000000", log_file=tmp_path / "log") as server:
        before = text_of(say(server))
        pid = engine_pid(server)
        assert str(home) not in Path(f"/proc/{pid}/maps").read_text()
        weights = home / "blue" / "model.safetensors"
        match how:
            case "overwritten":
                shutil.copyfile(root / "green" / "model.safetensors", weights)
                shutil.copyfile(root / "green" / "manifest.json", home / "blue" / "manifest.json")
                shutil.copyfile(root / "green" / "golden.json", home / "blue" / "golden.json")
            case "cut short":
                os.truncate(weights, 1000)
            case "deleted":
                shutil.rmtree(home / "blue")
            case "replaced":
                shutil.rmtree(home / "blue")
                shutil.copytree(root / "green", home / "blue")
        assert text_of(say(server)) == before
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: server.status("/health/ready") == 503)
        wait_for(lambda: "could not be started again" in server.log_file.read_text(), seconds=90)
        with pytest.raises(openai.APIStatusError) as refused:
            say(server)
        assert refused.value.status_code == 503
        refusals = [line["message"] for line in server.log() if "could not be started again" in line["message"]]
        why = "model.safetensors" if how == "cut short" else "is not what it was when the server read it"
        assert all(why in refusal for refusal in refusals), refusals
        if how in ("overwritten", "replaced"):
            assert admin(server, "POST", "/models/swap", {"name": "served", "path": "blue"})[0] == 200
            assert text_of(say(server)) not in ("", before)
