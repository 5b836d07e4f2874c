"""`onebit adapt` and `onebit-serve --adapter`: one model, two adapters, each asked for by name with the real client."""

import subprocess
import sys

import openai
import pytest

from tests.support.adapted import TEXT
from tests.support.server_process import ROOT, running_server, server_environment

pytestmark = pytest.mark.acceptance


def onebit(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [sys.executable, "-m", "onebit_core.cli.main", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=server_environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def adapter(tiny_artifact, tmp_path_factory):
    """An adapter of the tiny artifact, by the command line."""
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "windmill.txt").write_text(TEXT)
    few = ("--steps", 12, "--batch", 2, "--tokens", 32, "--set", "held_out=2", "--set", "scale_rate=0.4")
    done = onebit("adapt", tiny_artifact, "--text", folder / "windmill.txt", "--out", folder / "mill", *few)
    assert done.returncode == 0, done.stderr
    assert "tiny:mill" in done.stdout
    return folder / "mill"


@pytest.fixture(scope="module")
def server(tiny_artifact, adapter, tmp_path_factory):
    arguments = (str(tiny_artifact), "--adapter", str(adapter), "--adapter", f"again={adapter}")
    with running_server(
        *arguments, "--kv-cache-bytes", "8000000", log_file=tmp_path_factory.mktemp("log") / "log"
    ) as it:
        yield it


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


def ask(client, model: str, **more):
    return client.completions.create(model=model, prompt="hello world", max_tokens=12, temperature=0, **more)


def test_models_list_their_adapters(client):
    """With the model that they belong to as parent, and each alone, too."""
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["tiny", "tiny:mill", "tiny:again"]
    assert (cards["tiny:mill"].root, cards["tiny:mill"].parent) == ("tiny", "tiny")
    assert client.models.retrieve("tiny:mill").id == "tiny:mill"


def test_a_request_takes_the_adapter_it_names(client):
    """Text differs from the base's, equals that of the same adapter under another name, and carries the name."""
    base, mill, again = (ask(client, name) for name in ("tiny", "tiny:mill", "tiny:again"))
    assert (base.model, mill.model) == ("tiny", "tiny:mill")
    assert base.choices[0].text != mill.choices[0].text
    assert mill.choices[0].text == again.choices[0].text
    streamed = "".join(chunk.choices[0].text for chunk in ask(client, "tiny:mill", stream=True))
    assert streamed == mill.choices[0].text
    chat = client.chat.completions.create(
        model="tiny:mill", messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0
    )
    assert chat.model == "tiny:mill"
    vectors = [client.embeddings.create(model=name, input="hello").data[0].embedding for name in ("tiny", "tiny:mill")]
    assert vectors[0] != vectors[1]


@pytest.mark.parametrize("name", ["tiny:none", "tiny:", "other:mill", "tiny:mill:mill"])
def test_an_adapter_that_is_not_there_is_not_found(client, name):
    """A 404 that says what is."""
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, name)
    assert "mill" in refused.value.message or "known: tiny" in refused.value.message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--adapter", "nowhere"), "nowhere: not an adapter"),
        (("--adapter", "{adapter}", "--adapter", "{adapter}"), "one name and one model"),
        (("--adapter", "a:b={adapter}"), "adapter name 'a:b'"),
    ],
)
def test_a_server_does_not_start_with_what_is_no_adapter(tiny_artifact, adapter, arguments, said):
    """In one sentence, before a model is loaded."""
    given = [argument.format(adapter=adapter) for argument in arguments]
    command = [sys.executable, "-m", "service", str(tiny_artifact), *given]
    done = subprocess.run(command, cwd=ROOT, env=server_environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_learned_is_refused(tiny_artifact, adapter, tmp_path):
    """The command line's errors are sentences, and leave nothing behind."""
    done = onebit("adapt", tiny_artifact, "--text", "self:", "--out", tmp_path / "new")
    assert done.returncode == 2
    assert "self:" in done.stderr
    done = onebit("adapt", tiny_artifact, "--text", adapter.parent / "windmill.txt", "--out", adapter)
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert not list(tmp_path.iterdir())
