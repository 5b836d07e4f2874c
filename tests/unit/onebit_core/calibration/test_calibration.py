"""Calibration text, its windows, and the statistics of inputs."""

import json

import pytest
import torch

from onebit_core.calibration.sampling import sample_tokens
from onebit_core.calibration.sources import BUILTIN, BUILTIN_HELDOUT, read_text
from onebit_core.calibration.statistics import StatisticsAccumulator, fast_float32_products
from onebit_core.errors import CalibrationError
from tests.support.tiny_model import byte_tokenizer


def test_sources_of_every_kind(tmp_path):
    """Text, JSON lines and folders are read; line ends become LF."""
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "id": 1}\n')
    (tmp_path / "c.bin").write_text("ignored")
    assert read_text(str(tmp_path / "a.txt")) == "one\ntwo"
    assert read_text(str(tmp_path / "b.jsonl")) == "three\n\nfour"
    assert read_text(str(tmp_path)) == "one\ntwo\n\nthree\n\nfour"


def test_the_builtin_text_and_its_heldout_part_do_not_overlap():
    """Calibration never sees evaluation text: no long line stands in both."""
    calibration, heldout = read_text(BUILTIN), read_text(BUILTIN_HELDOUT)
    assert len(calibration) > 100_000
    assert len(heldout) > 20_000
    paragraphs = {part for part in heldout.split("\n\n") if len(part) > 200}
    assert len(paragraphs) > 50
    assert not {part for part in paragraphs if part in calibration}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"txt": "x"}', 'line 1 is not an object with a "text" field'),
        ('{"text": 3}', "line 1 is not a string"),
        ("{", "line 1"),
        ("\n\n", "empty"),
    ],
)
def test_broken_json_lines_are_named(tmp_path, content, message):
    """The line and what is wrong with it."""
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(CalibrationError, match=r"x\.jsonl") as caught:
        read_text(str(tmp_path / "x.jsonl"))
    assert message in str(caught.value)


def test_a_json_line_ends_at_a_line_feed_only(tmp_path):
    """JSON may hold U+2028 and U+0085 unescaped, and web text does."""
    parts = ["a\u2028b", "c\x85d"]
    lines = "\n".join(json.dumps({"text": part}, ensure_ascii=False) for part in parts)
    (tmp_path / "x.jsonl").write_text(lines, encoding="utf-8")
    assert read_text(str(tmp_path / "x.jsonl")) == "\n\n".join(parts)


@pytest.mark.parametrize("source", ["a" * 5000, "~no-such-user/x.txt", "a\0b"])
def test_a_path_that_cannot_be_is_refused(source):
    """Too long, of nobody, with a zero byte."""
    with pytest.raises(CalibrationError):
        read_text(source)


def draw(tmp_path, **changes):
    (tmp_path / "a.txt").write_text("".join(chr(97 + i % 26) for i in range(4000)))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "0123456789" * 300}))
    values = {"samples": 7, "tokens": 64, "seed": 0, **changes}
    return sample_tokens(byte_tokenizer(), [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], **values)


def test_windows_are_spread_over_all_texts(tmp_path):
    """Seven samples of two texts: four and three, each a run of its text."""
    tokens = draw(tmp_path)
    assert tokens.ids_ST.shape == (7, 64)
    digits = (tokens.ids_ST < 97).all(1)
    assert digits.tolist() == [False] * 4 + [True] * 3
    letters = tokens.ids_ST[:4]
    assert torch.equal((letters[:, 1:] - letters[:, :-1]) % 26, torch.ones(4, 63, dtype=torch.int64))
    assert set(map(len, tokens.fingerprints.values())) == {64}


def test_every_text_gets_a_sample(tmp_path):
    """A text that would not be used is refused, so that the fingerprints name only what was."""
    with pytest.raises(CalibrationError, match="1 samples of 2 texts"):
        draw(tmp_path, samples=1)


def test_the_seed_decides(tmp_path):
    """Same seed, same windows; another seed, other ones."""
    assert torch.equal(draw(tmp_path).ids_ST, draw(tmp_path).ids_ST)
    assert not torch.equal(draw(tmp_path).ids_ST, draw(tmp_path, seed=1).ids_ST)


def test_windows_do_not_overlap(tmp_path):
    """Even when the text is only just long enough."""
    (tmp_path / "exact.txt").write_bytes(bytes(range(32, 96)) * 2)
    tokens = sample_tokens(byte_tokenizer(), [str(tmp_path / "exact.txt")], samples=2, tokens=64, seed=3)
    assert torch.equal(tokens.ids_ST[0], tokens.ids_ST[1])
    assert torch.equal(tokens.ids_ST[0], torch.arange(32, 96))


def test_hessian_is_the_weighted_mean_of_outer_products():
    """First tokens count with their weight, all others once."""
    x = torch.randn(3, 5, 4)
    accumulator = StatisticsAccumulator(4, first_token_weight=8.0)
    accumulator.add(x[:1])
    accumulator.add(x[1:])
    weights = torch.ones(3, 5)
    weights[:, 0] = 8.0
    expected = torch.einsum("st,sti,stj->ij", weights.double(), x.double(), x.double()) / weights.sum()
    statistics = accumulator.finish()
    torch.testing.assert_close(statistics.hessian_II.double(), expected, rtol=2e-2, atol=2e-2)
    assert statistics.num_tokens == 15


def test_fast_products_leave_no_trace():
    """The global matmul precision returns to what it was."""
    before = torch.get_float32_matmul_precision()
    with fast_float32_products():
        pass
    assert torch.get_float32_matmul_precision() == before
