"""An original beside its artifact in one real server, and embeddings of both through the real `openai` package."""

import openai
import pytest
import torch
from torch.nn import functional as F

from onebit_core.artifact.reader import load_model
from onebit_core.model.loading import load_original
from tests.support.server_process import running_server

pytestmark = pytest.mark.acceptance

TEXTS = ["a text", "another one", "a text"]


@pytest.fixture(scope="module")
def client(tiny_artifact, tiny_model, tmp_path_factory):
    log_file = tmp_path_factory.mktemp("server") / "log"
    with running_server(
        str(tiny_artifact), str(tiny_model.parent / "tiny-original"), "--kv-cache-bytes", "8000000", log_file=log_file
    ) as server:
        yield openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module", autouse=True)
def _second_name(tiny_model):
    """The folder under another name, because artifact and model have the same."""
    link = tiny_model.parent / "tiny-original"
    link.symlink_to(tiny_model)
    yield
    link.unlink()


@pytest.fixture(scope="module")
def dense(tiny_artifact, tiny_model):
    """Model name to what transformers computes it with."""
    original, tokenizer = load_original(str(tiny_model), dtype=torch.float32)
    return {"tiny": load_model(tiny_artifact, backend="dense").model, "tiny-original": original}, tokenizer


def test_models_say_what_they_are(client):
    """Method and stored bits of each; the original was not quantized."""
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert set(cards) == {"tiny", "tiny-original"}
    assert (cards["tiny"]["method"], cards["tiny-original"]["method"]) == ("rtn", "original")
    assert cards["tiny"]["bits_per_weight"] < cards["tiny-original"]["bits_per_weight"] == 32.0


def test_an_original_is_continued_as_transformers_does(client, dense):
    """Greedily, token for token; its artifact says something else."""
    models, tokenizer = dense
    prompt = "the original says"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    texts = {}
    for name, model in models.items():
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        texts[name] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=12, temperature=0)
        assert answer.choices[0].text == texts[name]


@pytest.mark.parametrize("encoding_format", [openai.NOT_GIVEN, "float", "base64"])
@pytest.mark.parametrize("name", ["tiny", "tiny-original"])
def test_embeddings_are_the_models_last_hidden_states(client, dense, name, encoding_format):
    """In both encodings, in order, equal texts alike, through a client that decodes base64 unless told otherwise."""
    models, tokenizer = dense
    answer = client.embeddings.create(model=name, input=TEXTS, encoding_format=encoding_format)
    assert [item.index for item in answer.data] == [0, 1, 2]
    num_tokens = sum(len(tokenizer(text)["input_ids"]) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)
    if encoding_format == "base64":
        assert all(isinstance(item.embedding, str) for item in answer.data)
        return
    for text, item in zip(TEXTS, answer.data, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden_D = models[name].base_model(input_ids=ids).last_hidden_state[0, -1]
        expected = F.normalize(hidden_D, dim=-1)
        torch.testing.assert_close(torch.tensor(item.embedding), expected, rtol=5e-3, atol=5e-3)


def test_a_wrong_size_is_the_clients_bad_request(client):
    """The package's own exception, with the field's name."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="tiny", input="a", dimensions=5)
    assert caught.value.param == "dimensions"
