"""Zero-shot accuracy, through lm-eval: the questions, formats and measures everybody else reports.

A task of lm-eval turns a question into requests, "how likely is this continuation after this context?", one a choice,
and answers into measures. It comes from lm-eval by name, or is made here from a file in the formats lm-eval uses for
the same data (questions.py), so no network is needed. lm-eval also cuts context from continuation (by encoding both
together). Our part is what answers requests: continuations.py, for the original and the artifact in turn, so that
both meet the same questions and one result holds both.

    acc         the choice with the largest log-likelihood is the right one
    acc_norm    the same after dividing by the letters of the choice, which long choices need
    agreement   both models choose the same, right or wrong

Source: Gao et al., lm-evaluation-harness, https://github.com/EleutherAI/lm-evaluation-harness. Prompts are without
examples and without a chat template, as quantization papers measure; a task with its own number of examples keeps it.

This is the only module that imports lm-eval, which is an extra: import it where it is needed.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import datasets
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from onebit_core.artifact.manifest import TaskResult
from onebit_core.artifact.writer import current_versions, utc_now
from onebit_core.errors import EvaluationError, first_line
from onebit_core.evaluation.accuracy import accuracy
from onebit_core.evaluation.compare import describe_device
from onebit_core.evaluation.continuations import ContinuationScorer
from onebit_core.evaluation.questions import BLANK, Question, choose, has_blanks, read_questions
from onebit_core.progress import Watch

QUESTIONS_PER_STEP = 32
"""Between two looks at the cancel token; enough to make full batches of similar lengths."""
EXAMPLES_SEED = 1234
"""lm-eval's own seed for the examples of a task that has some."""
SIMILAR_NAMES = 8


class FileTask(ConfigurableTask):  # type: ignore[misc]
    """A task of lm-eval whose questions come from a file."""

    def __init__(self, name: str, questions: Sequence[Question]) -> None:
        """Make the task; `questions` as read_questions gives them."""
        measures = ["acc"] if has_blanks(questions) else ["acc", "acc_norm"]
        self._documents = _fill_in(questions) if has_blanks(questions) else _question_and_answer(questions)
        super().__init__(
            config={
                "task": name,
                "output_type": "multiple_choice",
                "test_split": "test",
                "metric_list": [
                    {"metric": measure, "aggregation": "mean", "higher_is_better": True} for measure in measures
                ],
                "doc_to_text": "text",
                "doc_to_target": "target",
                "doc_to_choice": "choices",
                "metadata": {"version": 1.0},
            }
        )

    def download(self, *_: Any, **__: Any) -> None:
        """Take the questions that are here; nothing is fetched."""
        self.dataset = {"test": datasets.Dataset.from_list(self._documents)}


def _question_and_answer(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Lay questions out as lm-eval does for ARC and PIQA: one context, a continuation a choice."""
    return [
        {"text": f"Question: {one.question}\nAnswer:", "choices": list(one.choices), "target": one.gold}
        for one in questions
    ]


def _fill_in(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Lay questions out as lm-eval does for WinoGrande: a context a choice, one continuation.

    lm-eval knows this form by a text that is a number, the right choice; target and choices are then the
    continuation and the contexts.
    """
    documents = []
    for one in questions:
        before, _, after = one.question.partition(BLANK)
        contexts = [before + choice for choice in one.choices]
        documents.append({"text": one.gold, "choices": contexts, "target": after.strip()})
    return documents


class ScoringModel(TemplateLM):  # type: ignore[misc]
    """A model as lm-eval sees it: answers log-likelihood requests and nothing else."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap a model in evaluation mode."""
        super().__init__()
        self.tokenizer = tokenizer
        self._scorer = ContinuationScorer(model)

    @property
    def eot_token_id(self) -> int:
        """The token that stands for no context."""
        tokenizer = self.tokenizer
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return 0 if prefix is None else int(prefix)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: FBT001
        """Encode with the tokenizer's defaults, or as told."""
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **options)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._scorer.score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:  # noqa: FBT001, FBT002
        """Not for multiple choice."""
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:  # noqa: FBT001, FBT002
        """Not for multiple choice."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question as a task puts it: its document and one request a choice."""

    document: Mapping[str, Any]
    requests: Sequence[Any]
    choices: int


@dataclass(kw_only=True)
class Answers:
    """One model's answers, a number a question: which choice, whether it is right, and right after normalizing."""

    chosen: list[int] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    right_norm: list[float] = field(default_factory=list)


def load_tasks(wanted: Mapping[str, str | None], manager: TaskManager | None = None) -> dict[str, ConfigurableTask]:
    """Return the tasks of some names; a name of lm-eval's may stand for several.

    Args:
        wanted: name to file of questions; None for lm-eval's own task of that name.
        manager: knows lm-eval's tasks; by default one that knows all, which takes it ten seconds to find out.

    Raises:
        EvaluationError: a file is not one of questions, lm-eval has no such task, its data is not here, or it does not
            consist of multiple-choice questions.
    """
    tasks: dict[str, ConfigurableTask] = {}
    for name, file in wanted.items():
        if file is not None:
            tasks[name] = FileTask(name, read_questions(name, file))
        else:
            manager = manager or TaskManager()
            tasks |= _named(name, manager)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice" or "acc" not in task.aggregation():
            raise EvaluationError(f"task {name}: only multiple-choice tasks measured by `acc` can be evaluated")
        task.set_fewshot_seed(EXAMPLES_SEED)
    return tasks


def _named(name: str, manager: TaskManager) -> dict[str, ConfigurableTask]:
    """Load lm-eval's own task of a name."""
    if name not in manager.all_tasks:
        close = difflib.get_close_matches(name, manager.all_tasks, n=SIMILAR_NAMES)
        near = f"; similar names: {', '.join(close)}" if close else ""
        raise EvaluationError(f"task {name}: lm-eval has none of this name{near}; for a file say {name}=FILE.jsonl")
    try:
        loaded: dict[str, ConfigurableTask] = manager.load([name])["tasks"]
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise EvaluationError(
            f"task {name}: its questions cannot be loaded ({first_line(error)}); lm-eval's own tasks need the network, "
            f"or a Hugging Face cache that has them already. With a file of questions: --task {name}=FILE.jsonl"
        ) from error
    return loaded


def evaluate_task(
    name: str,
    task: ConfigurableTask,
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    watch: Watch | None = None,
) -> TaskResult:
    """Ask two models the same questions.

    Args:
        name: of the task.
        task: one of load_tasks.
        models: the original and the compressed one, in evaluation mode.
        tokenizer: of both.
        limit: how many questions, see questions.choose; None for all.
        watch: told after every few questions, in stage `evaluate`.

    Raises:
        EvaluationError: logits are not finite.
        Cancelled: between two steps.
    """
    watch = watch or Watch()
    available = len(task.eval_docs)
    questions = [ask(task, index) for index in choose(available, limit)]
    scoring = [ScoringModel(model, tokenizer) for model in models]
    answers = (Answers(), Answers())
    watch.report("evaluate", 0, len(questions), dataset=name)
    for start in range(0, len(questions), QUESTIONS_PER_STEP):
        step = questions[start : start + QUESTIONS_PER_STEP]
        for model, of_model in zip(scoring, answers, strict=True):
            _answer(task, step, model, of_model)
            watch.cancel.raise_if_cancelled()
        right = [accuracy(of_model.right).value for of_model in answers]
        done = start + len(step)
        watch.report("evaluate", done, len(questions), dataset=name, original=right[0], compressed=right[1])
    return _result(name, questions, available, answers, models[0])


def ask(task: ConfigurableTask, index: int) -> Asked:
    """Let the task put one of its questions."""
    document = task.eval_docs[index]
    context = task.fewshot_context(
        document, num_fewshot=task.config.num_fewshot or 0, gen_prefix=task.doc_to_prefix(document)
    )
    requests = task.construct_requests(doc=document, ctx=context, metadata=(task.task_name, index, 1))
    return Asked(document=document, requests=requests, choices=len(task.doc_to_choice(document)))


def _answer(task: ConfigurableTask, step: Sequence[Asked], model: ScoringModel, answers: Answers) -> None:
    """Add a model's answers to some questions."""
    requests = [request for one in step for request in one.requests]
    scores = iter(model.loglikelihood(requests, disable_tqdm=True))
    for one in step:
        of_question = [next(scores) for _ in one.requests]
        measures = task.process_results(one.document, of_question)
        logs = [log for log, _ in of_question[: one.choices]]
        answers.chosen.append(logs.index(max(logs)))
        answers.right.append(float(measures["acc"]))
        if "acc_norm" in measures:
            answers.right_norm.append(float(measures["acc_norm"]))


def _result(
    name: str,
    questions: Sequence[Asked],
    available: int,
    answers: tuple[Answers, Answers],
    original: PreTrainedModel,
) -> TaskResult:
    """Summarize both models' answers."""
    before, after = answers
    agreement = accuracy([float(a == b) for a, b in zip(before.chosen, after.chosen, strict=True)])
    paired = accuracy([b - a for a, b in zip(before.right, after.right, strict=True)])
    return TaskResult(
        task=name,
        fingerprint=_fingerprint(questions),
        questions=len(questions),
        available=available,
        chance=accuracy([1 / one.choices for one in questions]).value,
        original=accuracy(before.right),
        compressed=accuracy(after.right),
        difference_standard_error=paired.standard_error,
        original_norm=accuracy(before.right_norm) if before.right_norm else None,
        compressed_norm=accuracy(after.right_norm) if after.right_norm else None,
        agreement=agreement.value,
        agreement_standard_error=agreement.standard_error,
        device=describe_device(original.device),
        dtype=str(original.dtype).removeprefix("torch."),
        date=utc_now(),
        versions={**current_versions(), "lm_eval": version("lm_eval")},
    )


def _fingerprint(questions: Sequence[Asked]) -> str:
    """Return the sha256 of the documents and of the words they were asked in."""
    return hashlib.sha256("\n".join(_lines(questions)).encode()).hexdigest()


def _lines(questions: Sequence[Asked]) -> Iterator[str]:
    """Write every question as a line of JSON."""
    for one in questions:
        asked = [list(map(str, request.args)) for request in one.requests]
        yield json.dumps([asked, dict(one.document)], sort_keys=True, default=str)
