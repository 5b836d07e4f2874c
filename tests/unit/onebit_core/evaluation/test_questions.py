"""Files of questions: read as they are meant, refused with the line that is wrong, chosen the same way every time."""

import json
from pathlib import Path
from typing import Any

import pytest

from onebit_core.errors import EvaluationError
from onebit_core.evaluation.questions import choose, has_blanks, read_questions


def write(folder: Path, *lines: Any) -> str:
    file = folder / "questions.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(file)


def ask(question: str, *choices: str, gold: Any = 0) -> dict[str, Any]:
    return {"question": question, "choices": choices, "gold": gold}


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    """Empty lines are skipped; a letter that some readers take for the end of a line does not end it."""
    file = write(tmp_path, ask("What\u2028floats?", "stone", "cork", gold=1), "", ask("Why?", "so", "thus", "hence"))

    first, second = read_questions("mine", file)

    assert (first.question, first.choices, first.gold) == ("What\u2028floats?", ("stone", "cork"), 1)
    assert len(second.choices) == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: .*expected an object"),
        ({"question": "Why?", "choices": ["a", "b"]}, "line 2: .*'gold' is required"),
        (ask("Why?", "a", "b", gold="a"), "line 2: .*expected int"),
        (ask("Why?", "a", "b", gold=2), "line 2: gold is 2, but the choices are 0 to 1"),
        (ask("Why?", "a", "b", gold=-1), "line 2: gold is -1"),
        (ask("Why?", "a"), "line 2: .*at least two choices"),
        (ask("Why?", "a", " "), "line 2: .*not empty"),
        (ask(" ", "a", "b"), "line 2: .*needs words"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: Any, reason: str) -> None:
    """Task, file and line stand in the message."""
    with pytest.raises(EvaluationError, match=f"task mine: .*questions.jsonl, {reason}"):
        read_questions("mine", write(tmp_path, ask("Why?", "a", "b"), line))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    """Missing, empty, and binary files."""
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_questions("mine", str(tmp_path / "missing.jsonl"))
    with pytest.raises(EvaluationError, match="has no questions"):
        read_questions("mine", write(tmp_path, ""))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="cannot be read as text"):
        read_questions("mine", str(tmp_path / "binary"))


def test_blanks_are_seen_only_if_every_question_has_exactly_one(tmp_path: Path) -> None:
    """Some questions of ARC have underscores, too."""
    blanks = [ask("The _ sank.", "stone", "cork"), ask("A _ floats.", "cork", "stone")]
    assert has_blanks(read_questions("mine", write(tmp_path, *blanks)))
    for other in (ask("What sank?", "stone", "cork"), ask("It is ___ .", "stone", "cork")):
        assert not has_blanks(read_questions("mine", write(tmp_path, *blanks, other)))


def test_a_blank_at_the_end_leaves_nothing_to_score(tmp_path: Path) -> None:
    """Every choice would be as likely as the others."""
    with pytest.raises(EvaluationError, match="nothing follows the blank"):
        read_questions("mine", write(tmp_path, ask("It was the _ ", "stone", "cork")))


def test_the_same_questions_are_chosen_every_time_and_more_include_fewer() -> None:
    """All without a limit; otherwise not simply the first of the file."""
    assert choose(5, None) == [0, 1, 2, 3, 4]
    assert choose(3, 10) == [0, 1, 2]
    few, many = choose(1000, 20), choose(1000, 50)
    assert few == choose(1000, 20) == sorted(set(few))
    assert set(few) < set(many)
    assert max(few) > 500
