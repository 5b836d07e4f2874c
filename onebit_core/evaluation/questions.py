"""Multiple-choice questions from a file: one JSON object a line.

    {"question": "Which of these floats?", "choices": ["a stone", "a cork"], "gold": 1}

`gold` is the index of the right choice. A file is asked in one of two forms, those that lm-eval uses for the data sets
they come from, and which one is seen from the questions:

    question and answer (ARC, PIQA)     after the question and `Answer:`, how likely is each choice?
    fill in the blank (WinoGrande)      every question has exactly one `_`: with each choice in its place, how likely is
                                        the rest of the sentence? (Trinh and Le, arXiv 1806.02847, section 3: partial
                                        scoring. The choices differ in length, the rest does not.)

Of a long file the first N of an order shuffled with a fixed seed are asked: files are often sorted by source or answer,
a smaller N asks a part of a larger one, and every model is asked the same.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError, EvaluationError

BLANK = "_"
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Question(StrictConfig):
    """One question; `gold` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    gold: int


def read_questions(name: str, file: str) -> tuple[Question, ...]:
    """Read and check a file of questions.

    Args:
        name: what to call it in messages.
        file: its path.

    Raises:
        EvaluationError: it cannot be read, has no question, or a line is not one.
    """
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"task {name}: {file} cannot be read as text: {error}") from error
    questions = tuple(
        _read_line(f"task {name}: {file}, line {index + 1}", line) for index, line in enumerate(lines) if line.strip()
    )
    if not questions:
        raise EvaluationError(f"task {name}: {file} has no questions; expected one JSON object a line")
    if has_blanks(questions):
        for question in questions:
            if not question.question.partition(BLANK)[2].strip():
                raise EvaluationError(
                    f"task {name}: nothing follows the blank in {question.question!r}, so nothing can be scored; "
                    "give it as a question with choices instead"
                )
    return questions


def has_blanks(questions: Sequence[Question]) -> bool:
    """Say whether these are sentences with a blank: every one has exactly one."""
    return all(question.question.count(BLANK) == 1 for question in questions)


def choose(available: int, limit: int | None) -> list[int]:
    """Return the indices of the questions to ask, ascending: all, or the first of the shuffled order."""
    order = list(range(available))
    random.Random(SEED).shuffle(order)
    return sorted(order[:limit])


def _read_line(where: str, line: str) -> Question:
    """Read one question, or say what is wrong with it."""
    try:
        question = Question.from_dict(json.loads(line))
    except ValueError as error:
        raise EvaluationError(f"{where}: not JSON: {error}") from error
    except ConfigError as error:
        raise EvaluationError(f"{where}: {error}") from error
    choices = question.choices
    if len(choices) < 2 or not all(choice.strip() for choice in choices) or not question.question.strip():
        raise EvaluationError(f"{where}: a question needs words and at least two choices that are not empty")
    if not 0 <= question.gold < len(choices):
        raise EvaluationError(f"{where}: gold is {question.gold}, but the choices are 0 to {len(choices) - 1}")
    return question
