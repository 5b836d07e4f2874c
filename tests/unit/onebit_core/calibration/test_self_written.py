"""Text that a model writes itself: what decides each token, and where documents begin."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from onebit_core.calibration.self_written import Vocabulary, draw_numbers, write_batch, write_documents, write_windows
from onebit_core.errors import Cancelled
from onebit_core.model.loading import load_original
from onebit_core.progress import CancelToken, ProgressEvent, Watch
from tests.support.tiny_model import EOS_ID, EOS_TOKEN, byte_tokenizer, save_tiny_model

TOKENS = 160


def load(folder, architecture="llama"):
    return load_original(str(save_tiny_model(folder, architecture=architecture)), dtype=torch.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(tmp_path_factory.mktemp("models") / "llama")


def documents_of(ids_T, begins_T):
    """Cut a window into its documents; gives (place, ids)."""
    places = [*begins_T.nonzero().flatten().tolist(), len(ids_T)]
    return [(first, ids_T[first:last]) for first, last in pairwise(places)]


def check_document(model, document, draws, vocabulary, lead):
    """Decide every token of a document again, from one uncached run over that document alone."""
    logits = model(document[None], use_cache=False).logits[0].double()
    logits[:, vocabulary.unknown_V] = -torch.inf
    count = len(vocabulary.first_F)
    if len(document) > lead:
        assert document[lead] == vocabulary.first_F[int(draws[lead] * count)]
    greedy = 3 + int((draws[lead] * count % 1) * 3) if len(document) > lead else 0
    for place in range(lead + 1, len(document)):
        before = torch.softmax(logits[place - 1], -1)
        if place <= lead + greedy:
            assert before[document[place]] > before.max() - 1e-6
        else:
            below, above = before[: document[place]].sum(), before[: document[place] + 1].sum()
            assert below - 1e-5 <= draws[place] <= above + 1e-5
    return greedy


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt", "gpt_neox"])
def test_every_token_is_distributed_as_if_its_document_were_alone(tmp_path, architecture):
    """Cache, mask and positions together: documents behind others in a window are what they would be by themselves."""
    model, tokenizer = load(tmp_path / "model", architecture)
    vocabulary = dataclasses.replace(Vocabulary.of(model, tokenizer), ends=torch.arange(97, 105))  # often
    draws_BT = draw_numbers(6, TOKENS, torch.Generator().manual_seed(1))
    ids_BT, begins_BT = write_batch(model, vocabulary, draws_BT, lambda _: None)
    greedy, later = set(), 0
    with torch.inference_mode():
        for ids_T, begins_T, draws_T in zip(ids_BT, begins_BT, draws_BT, strict=True):
            for place, document in documents_of(ids_T, begins_T):
                greedy.add(check_document(model, document, draws_T[place:].tolist(), vocabulary, lead=0))
                later += place > 0
    assert {3, 4, 5} <= greedy
    assert later > 3


def test_windows_are_full_and_documents_end_at_the_end_token(tiny):
    """A new document begins exactly behind each end token; nothing the tokenizer does not know is written."""
    model, tokenizer = tiny
    vocabulary = Vocabulary.of(model, tokenizer)
    ids_BT, begins_BT = write_batch(
        model, vocabulary, draw_numbers(16, TOKENS, torch.Generator().manual_seed(0)), lambda _: None
    )
    assert ids_BT.max() < len(tokenizer) < model.config.vocab_size
    assert begins_BT[:, 0].all()
    assert torch.equal(begins_BT[:, 1:], ids_BT[:, :-1] == EOS_ID)
    assert begins_BT[:, 1:].any()
    assert ids_BT[begins_BT].max() < EOS_ID, "special tokens begin no document"


def test_first_tokens_come_from_all_of_the_vocabulary(tiny):
    """Evenly: over many documents of one token, every ordinary token is drawn, special ones never."""
    model, tokenizer = tiny
    draws_BT = draw_numbers(5000, 1, torch.Generator().manual_seed(0))
    ids_BT, _ = write_batch(model, Vocabulary.of(model, tokenizer), draws_BT, lambda _: None)
    counts = torch.bincount(ids_BT[:, 0], minlength=320)
    assert (counts[:256] > 0).all()
    assert counts[256:].sum() == 0


def test_a_tokenizer_that_begins_texts_begins_documents(tiny):
    """Its token stands first in each document, even if it also ends them."""
    model, _ = tiny
    tokenizer = byte_tokenizer()
    begin = TemplateProcessing(single=f"{EOS_TOKEN} $A", special_tokens=[(EOS_TOKEN, EOS_ID)])
    tokenizer.backend_tokenizer.post_processor = begin
    vocabulary = Vocabulary.of(model, tokenizer)
    assert vocabulary.begin == EOS_ID
    draws_BT = draw_numbers(8, TOKENS, torch.Generator().manual_seed(0))
    ids_BT, begins_BT = write_batch(model, vocabulary, draws_BT, lambda _: None)
    assert (ids_BT[begins_BT] == EOS_ID).all()
    assert begins_BT[:, 1:].any()
    with torch.inference_mode():
        for ids_T, begins_T, draws_T in zip(ids_BT, begins_BT, draws_BT, strict=True):
            for place, document in documents_of(ids_T, begins_T):
                check_document(model, document, draws_T[place:].tolist(), vocabulary, lead=1)


def test_the_seed_decides_and_the_batch_does_not(tiny):
    """Same seed, same text; written three at a time or all at once."""
    model, tokenizer = tiny
    first, again, other, apart = (
        write_windows(model, tokenizer, samples=7, tokens=48, seed=seed, at_once=at_once)
        for seed, at_once in ((3, 32), (3, 32), (4, 32), (3, 3))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first == apart).float().mean() > 0.9  # rounding may turn a choice, and then what follows it


def test_progress_is_told_and_cancellation_heard(tiny):
    """Token by token over all batches; a set token stops between two."""
    model, tokenizer = tiny
    events: list[ProgressEvent] = []
    write_windows(model, tokenizer, samples=5, tokens=8, seed=0, at_once=3, watch=Watch(sink=events.append))
    assert [(event.stage, event.done, event.total) for event in events] == [
        ("write text", done, 16) for done in range(17)
    ]
    cancel = CancelToken()

    def sink(event):
        if event.done == 5:
            cancel.cancel()

    with pytest.raises(Cancelled):
        write_windows(model, tokenizer, samples=5, tokens=8, seed=0, watch=Watch(sink=sink, cancel=cancel))


def test_documents_are_as_many_as_asked_for(tiny):
    """Text of at most so many tokens, the same for the same seed, without special tokens."""
    model, tokenizer = tiny
    texts = list(write_documents(model, tokenizer, documents=11, tokens=TOKENS, seed=0, at_once=4))
    assert len(texts) == 11
    assert all(0 < len(tokenizer(text)["input_ids"]) <= 3 * TOKENS for text in texts)  # broken bytes become U+FFFD
    assert not any("<|" in text for text in texts)
    assert texts == list(write_documents(model, tokenizer, documents=11, tokens=TOKENS, seed=0, at_once=4))
    assert len(set(texts)) == 11
