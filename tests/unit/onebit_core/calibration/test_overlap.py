"""Calibration text never overlaps evaluation text."""

import json

import pytest

from onebit_core.calibration.overlap import overlapping_sources


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "news").mkdir()
    (tmp_path / "news/a.txt").write_text("some news")
    (tmp_path / "news/b.txt").write_text("other news")
    (tmp_path / "copy.md").write_text("some news")
    (tmp_path / "same-size.txt").write_text("SOME NEWS")
    (tmp_path / "link.txt").symlink_to(tmp_path / "news/a.txt")
    (tmp_path / "qa.jsonl").write_text(json.dumps({"text": "t", "question": "q", "answer": "a"}))
    return tmp_path


@pytest.mark.parametrize(
    ("calibration", "evaluation"),
    [
        ("news/a.txt", "news/a.txt"),
        ("news/a.txt", "news/../news/a.txt"),
        ("news/a.txt", "link.txt"),
        ("news/a.txt", "copy.md"),
        ("news", "news/b.txt"),
        ("link.txt", "news"),
        ("qa.jsonl", "qa.jsonl#text"),
        ("qa.jsonl#answer", "qa.jsonl#answer"),
    ],
)
def test_the_same_file_is_found_by_any_name(folder, calibration, evaluation):
    """By path, link, folder, or as a copy."""
    pair = f"{folder}/{calibration}", f"{folder}/{evaluation}"
    assert overlapping_sources(["builtin:python", pair[0]], ["self:", pair[1]]) == pair


@pytest.mark.parametrize(
    ("calibration", "evaluation"),
    [
        ("news/a.txt", "news/b.txt"),
        ("news/a.txt", "same-size.txt"),
        ("qa.jsonl#question", "qa.jsonl#answer"),
        ("none.txt", "none.txt"),
    ],
)
def test_other_text_is_let_pass(folder, calibration, evaluation):
    """Other files, other columns, and what is not there."""
    assert overlapping_sources([f"{folder}/{calibration}"], [f"{folder}/{evaluation}"]) is None


def test_builtin_texts_overlap_with_themselves_only():
    """The held-out part is there to be measured on; text that the model writes is in no file."""
    assert overlapping_sources(["builtin:python"], ["builtin:python"])
    assert overlapping_sources(["builtin:python", "self:"], ["builtin:python-heldout"]) is None
