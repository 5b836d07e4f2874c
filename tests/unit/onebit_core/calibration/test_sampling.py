"""Windows of sources that are not read as a whole, and shares of several sources."""

import json
import random

import pytest
import torch

from onebit_core.calibration import sampling
from onebit_core.calibration.documents import JsonLines
from onebit_core.calibration.sampling import fingerprint_of, sample_tokens, share_samples
from onebit_core.errors import CalibrationError, TooLittleText
from tests.support.tiny_model import byte_tokenizer


@pytest.fixture
def large(monkeypatch):
    """Everything over 1000 characters is large."""
    monkeypatch.setattr(sampling, "WHOLE_CHARACTERS", 1000)


def numbered(path, count, words=12):
    """JSON lines whose documents say which they are."""
    texts = [f"[{number:05}]" * words for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def draw(source, **changes):
    values = {"samples": 8, "tokens": 100, "seed": 0, **changes}
    return sample_tokens(byte_tokenizer(), [source], **values)


def text_of(ids_T):
    return bytes(ids_T.tolist()).decode()


def numbers_in(text):
    return {int(part[:5]) for part in text.split("[")[1:] if len(part) >= 6}


def test_windows_of_a_large_source_are_spread_over_it(tmp_path, large):
    """One window from each eighth of the documents, of documents in order, none of them twice."""
    tokens = draw(numbered(tmp_path / "x.jsonl", 800))
    assert tokens.ids_ST.shape == (8, 100)
    seen = [numbers_in(text_of(ids_T)) for ids_T in tokens.ids_ST]
    assert [sorted(each)[0] // 100 for each in seen] == list(range(8))
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert "]\n\n[" in text_of(tokens.ids_ST[0])


def test_the_fingerprint_of_a_large_source_covers_its_windows(tmp_path, large):
    """sha256 of the ids; of a small one, of its text. Both are named."""
    (tmp_path / "small.txt").write_text("small " * 150)
    source, small = numbered(tmp_path / "x.jsonl", 800), str(tmp_path / "small.txt")
    tokens = sample_tokens(byte_tokenizer(), [source, small], samples=4, tokens=50, seed=0)
    assert tokens.covers == {source: "windows", small: "text"}
    assert tokens.fingerprints[source] == fingerprint_of(tokens.ids_ST[:2])


def test_the_seed_decides_the_windows_of_a_large_source(tmp_path, large):
    """Same seed, same windows, also compressed; another seed, others."""
    source = numbered(tmp_path / "x.jsonl", 800)
    assert torch.equal(draw(source).ids_ST, draw(source).ids_ST)
    assert not torch.equal(draw(source).ids_ST, draw(source, seed=1).ids_ST)


def test_only_what_is_needed_is_read(tmp_path, large, monkeypatch):
    """Of 20,000 documents, a few around each window and the first, to see that it is large."""
    source = numbered(tmp_path / "x.jsonl", 20_000)
    read = []
    monkeypatch.setattr(JsonLines, "_lines", counted(JsonLines._lines, read))
    draw(source)
    assert len(read) < 200


def counted(lines, read):
    def count(*arguments):
        for place, line in lines(*arguments):
            read.append(place)
            yield place, line

    return count


def test_the_last_part_is_full_too(tmp_path, large):
    """A window that begins behind the last documents of its part goes on with the first: every seed gives a window."""
    source = numbered(tmp_path / "x.jsonl", 40)
    for seed in range(30):
        assert draw(source, seed=seed, tokens=300).ids_ST.shape == (8, 300)


def test_a_long_document_is_entered_anywhere(tmp_path, large):
    """Books do not always show their first page."""
    generator = random.Random(0)
    books = ["".join(generator.choices("abcdefgh ", k=20_000)) for _ in range(4)]
    (tmp_path / "books.json").write_text(json.dumps(books))
    tokens = draw(str(tmp_path / "books.json"), samples=4, tokens=64)
    for book, ids_T in zip(books, tokens.ids_ST, strict=True):
        assert book.index(text_of(ids_T)) > 0


def test_a_large_source_that_is_too_short_is_refused(tmp_path, large):
    """Too few tokens in all of it, or fewer documents than windows."""
    source = numbered(tmp_path / "x.jsonl", 40)
    with pytest.raises(CalibrationError, match=r"tokens in all, too few for a sample of 100000"):
        draw(source, tokens=100_000)
    (tmp_path / "two.json").write_text(json.dumps(["a" * 900, "b" * 900]))
    with pytest.raises(CalibrationError, match="2 long documents for 8 samples"):
        draw(str(tmp_path / "two.json"))


@pytest.mark.parametrize(
    ("samples", "weights", "shares"),
    [
        (8, (), [3, 3, 2]),
        (8, (1.0, 1.0, 1.0), [3, 3, 2]),
        (8, (2.0, 1.0, 1.0), [4, 2, 2]),
        (10, (0.5, 0.3, 0.2), [5, 3, 2]),
        (7, (5.0, 1.0, 1.0), [5, 1, 1]),
        (3, (1.0, 1.0, 1.3), [1, 1, 1]),
    ],
)
def test_weights_share_the_samples(samples, weights, shares):
    """In proportion; what is left goes to the largest remainders, the first source first."""
    assert share_samples(["a", "b", "c"], samples, weights) == shares


def test_a_source_without_a_sample_is_refused():
    """The manifest would name a text that was not used."""
    with pytest.raises(CalibrationError, match="b: its weight gives it none of 3 samples"):
        share_samples(["a", "b"], 3, (100.0, 1.0))


def test_the_model_writes_its_share(tmp_path):
    """`self:` gets its windows from the writer and leaves the places of the others as they were."""
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(4000)))
    text = str(tmp_path / "a.txt")
    written_ST = torch.full((3, 16), 7)
    shares = []

    def write(samples):
        shares.append(samples)
        return written_ST

    values = {"tokens": 16, "seed": 5}
    mixed = sample_tokens(byte_tokenizer(), [text, "self:"], samples=4, weights=(1.0, 3.0), write=write, **values)
    assert shares == [3]
    assert torch.equal(mixed.ids_ST[1:], written_ST)
    assert torch.equal(mixed.ids_ST[:1], sample_tokens(byte_tokenizer(), [text], samples=1, **values).ids_ST)
    assert mixed.covers == {text: "text", "self:": "windows"}
    assert mixed.fingerprints["self:"] == fingerprint_of(written_ST)


def test_a_text_that_is_too_short_is_found_before_anything_is_written(tmp_path):
    """Writing takes long, and what was written for another number of samples cannot be used."""
    (tmp_path / "a.txt").write_text("short")

    def write(samples):
        raise AssertionError(f"asked for {samples}")

    with pytest.raises(TooLittleText):
        sample_tokens(byte_tokenizer(), ["self:", str(tmp_path / "a.txt")], samples=4, tokens=16, seed=0, write=write)


@pytest.mark.parametrize("form", ["one line", "long documents"])
def test_windows_are_found_where_few_documents_begin(tmp_path, monkeypatch, form):
    """A part in which no document begins is filled from those that follow, around the end if need be."""
    monkeypatch.setattr(sampling, "WHOLE_CHARACTERS", 1000)
    if form == "one line":
        source = tmp_path / "x.txt"
        source.write_text(" ".join(str(number) for number in range(4000)))
    else:
        source = tmp_path / "x.jsonl"
        source.write_text("\n".join(json.dumps({"text": f"{number} " * 2000}) for number in range(5)))
    tokens = sample_tokens(byte_tokenizer(), [str(source)], samples=16, tokens=50, seed=0)
    assert tokens.ids_ST.shape == (16, 50)


def test_weights_may_be_of_any_size():
    assert share_samples(["a", "b"], 8, [1e308, 1e308]) == [4, 4]
    assert share_samples(["a", "b"], 8, [3e-300, 1e-300]) == [6, 2]
