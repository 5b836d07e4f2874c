"""Zero-shot accuracy: asked as lm-eval asks, scored as lm-eval scores."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from onebit_core.artifact.manifest import Report, TaskResult
from onebit_core.artifact.reader import read_report
from onebit_core.errors import Cancelled, EvaluationError
from onebit_core.evaluation.run import EvaluateConfig, evaluate_artifact, with_task
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.run import quantize_model
from onebit_core.progress import ProgressEvent, Watch
from tests.support.sample_report import sample_task
from tests.support.tiny_model import byte_tokenizer, save_tiny_model

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval (extra `zeroshot`) is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*:Warning:lm_eval", "ignore:.*:Warning:datasets")

QUESTIONS = [
    {"question": f"What is {n} and {n}?", "choices": [str(2 * n), str(n), f"{n} {n} or more"], "gold": n % 3}
    for n in range(1, 46)
]
BLANKS = [
    {"question": f"Ann has {n} more than Bob, so _ 's pile is larger.", "choices": ["Ann", "Bobby"], "gold": n % 2}
    for n in range(1, 40)
]


def write(file: Path, questions: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return str(file)


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original, an artifact of it, and two files of questions."""
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model(folder / "original")
    quantize_model(
        QuantizeConfig(model=str(model), method="rtn", settings={"bits": 2}, name="tiny"), folder / "artifact"
    )
    write(folder / "sums.jsonl", QUESTIONS)
    write(folder / "blanks.jsonl", BLANKS)
    return folder


@pytest.fixture
def place(made_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_once, tmp_path / "place"))


def run(place: Path, tasks: tuple[str, ...] = ("sums",), watch: Watch | None = None, **options: Any) -> Any:
    files: dict[str, str | None] = {task: str(place / f"{task}.jsonl") for task in tasks}
    config = EvaluateConfig(tasks=files, dtype="float32", device="cpu", **options)
    return evaluate_artifact(place / "artifact", config, watch).tasks


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@needs_lm_eval
def test_results_are_written_into_the_artifact(place: Path) -> None:
    """One result a task, in the report, with what is needed to judge it; asked again, it is replaced."""
    run(place)
    first, second = run(place, ("sums", "blanks"))

    report = read_report(place / "artifact")
    assert report.tasks == (first, second)
    assert (first.task, first.questions, first.available) == ("sums", 45, 45)
    assert first.chance == pytest.approx(1 / 3)
    assert first.original_norm is not None
    assert second.original_norm is None
    assert second.chance == 0.5
    assert "lm_eval" in first.versions
    assert 0 < first.agreement < 1


@needs_lm_eval
def test_both_forms_score_as_lm_evals_own_model_and_evaluator_do(place: Path) -> None:
    """Accuracies and errors of both models are those lm-eval finds by itself."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from onebit_core.evaluation.zero_shot import load_tasks

    results = run(place, ("sums", "blanks"))

    tasks = load_tasks({name: str(place / f"{name}.jsonl") for name in ("sums", "blanks")})
    theirs_model = HFLM(load(place / "original"), tokenizer=byte_tokenizer(), batch_size=4, device="cpu")
    theirs = evaluate(theirs_model, {"tasks": tasks, "groups": {}, "group_map": {}}, bootstrap_iters=100)["results"]
    for ours in results:
        figures = theirs[ours.task]
        assert ours.original.value == pytest.approx(figures["acc,none"])
        assert ours.original.standard_error == pytest.approx(figures["acc_stderr,none"])
        if ours.original_norm is not None:
            assert ours.original_norm.value == pytest.approx(figures["acc_norm,none"])


@needs_lm_eval
def test_files_are_asked_in_the_words_of_lm_evals_own_tasks(tmp_path: Path) -> None:
    """ARC's template and WinoGrande's functions, on the same questions in their own fields, give the same requests."""
    import datasets
    import yaml
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks.winogrande import preprocess_winogrande

    from onebit_core.evaluation.zero_shot import ask, load_tasks

    class Own(ConfigurableTask):  # type: ignore[misc]
        def download(self, *_: Any, **__: Any) -> None:
            self.dataset = {"test": datasets.Dataset.from_list(self.config.metadata["documents"])}

    def own(config: dict[str, Any], documents: list[dict[str, Any]]) -> Any:
        kept = {key: config[key] for key in ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice")}
        metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
        return Own(config=kept | {"task": "own", "test_split": "test", "metric_list": metrics,
                                  "metadata": {"version": 1, "documents": documents}})  # fmt: skip

    arc_file = Path(preprocess_winogrande.__file__).parents[1] / "arc" / "arc_easy.yaml"
    arc = own(
        yaml.safe_load(arc_file.read_text()),
        [
            {"question": one["question"], "choices": {"text": one["choices"], "label": list("ABC")},
             "answerKey": "ABC"[one["gold"]]}
            for one in QUESTIONS
        ],
    )  # fmt: skip
    fields = ("doc_to_text", "doc_to_target", "doc_to_choice")
    functions = {field: getattr(preprocess_winogrande, field) for field in fields}
    winogrande = own(
        {"output_type": "multiple_choice", **functions},
        [
            {"sentence": one["question"], "option1": one["choices"][0], "option2": one["choices"][1],
             "answer": str(one["gold"] + 1)}
            for one in BLANKS
        ],
    )  # fmt: skip
    files = {"sums": write(tmp_path / "sums.jsonl", QUESTIONS), "blanks": write(tmp_path / "blanks.jsonl", BLANKS)}
    ours = load_tasks(files)
    for task, theirs in ((ours["sums"], arc), (ours["blanks"], winogrande)):
        for index in (0, 1, 30):
            wanted = [request.args for request in ask(theirs, index).requests]
            assert [request.args for request in ask(task, index).requests] == wanted
    assert ask(ours["sums"], 0).requests[0].args == ("Question: What is 1 and 1?\nAnswer:", " 2")


@needs_lm_eval
def test_a_model_agrees_with_itself(place: Path) -> None:
    """The artifact's original against the original: no difference, full agreement."""
    from onebit_core.evaluation.zero_shot import evaluate_task, load_tasks

    model = load(place / "original")
    task = load_tasks({"sums": str(place / "sums.jsonl")})["sums"]
    result = evaluate_task("sums", task, (model, model), byte_tokenizer())

    assert result.original == result.compressed
    assert (result.agreement, result.difference_standard_error) == (1.0, 0.0)


@needs_lm_eval
def test_a_limit_asks_fewer_and_is_told_apart(place: Path) -> None:
    """Other questions are another result, beside the first."""
    (part,) = run(place, task_limit=10)
    (whole,) = run(place)

    assert (part.questions, part.available) == (10, 45)
    assert part.fingerprint != whole.fingerprint
    assert read_report(place / "artifact").tasks == (part, whole)


@needs_lm_eval
def test_progress_counts_questions_and_cancel_stops(place: Path) -> None:
    """Events of stage evaluate name the task; nothing is written of a task that was stopped."""
    events: list[ProgressEvent] = []
    watch = Watch(sink=events.append)
    run(place, ("blanks",), watch)
    last = events[-1]
    assert (last.stage, last.done, last.total, last.detail["dataset"]) == ("evaluate", 39, 39, "blanks")

    stopping = Watch()
    stopping.cancel.cancel()
    with pytest.raises(Cancelled):
        run(place, ("sums",), stopping)
    assert [result.task for result in read_report(place / "artifact").tasks] == ["blanks"]


@needs_lm_eval
def test_tasks_of_lm_eval_are_found_by_name_or_refused(tmp_path: Path) -> None:
    """One whose data is here is loaded; unknown, without data, or not of multiple choice: one sentence each."""
    from lm_eval.tasks import TaskManager

    from onebit_core.evaluation.zero_shot import ask, load_tasks

    def define(name: str, output_type: str, data: str) -> None:
        lines = {
            "task": name, "dataset_path": data, "test_split": "train", "output_type": output_type,
            "doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "gold",
            "dataset_kwargs": {"data_files": str(tmp_path / "sums.jsonl"), "cache_dir": str(tmp_path / "cache")},
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(lines))  # JSON is YAML

    write(tmp_path / "sums.jsonl", QUESTIONS)
    define("named_sums", "multiple_choice", "json")
    define("far_sums", "multiple_choice", "nobody/has-this")
    define("written_sums", "generate_until", "json")
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    task = load_tasks({"named_sums": None}, manager)["named_sums"]
    assert ask(task, 0).requests[1].args == ("What is 1 and 1?", " 1")
    with pytest.raises(EvaluationError, match=r"named_sum: lm-eval has none.*named_sums.*named_sum=FILE.jsonl"):
        load_tasks({"named_sum": None}, manager)
    with pytest.raises(EvaluationError, match=r"far_sums: .*cannot be loaded.*need the network.*far_sums=FILE.jsonl"):
        load_tasks({"far_sums": None}, manager)
    with pytest.raises(EvaluationError, match="written_sums: only multiple-choice"):
        load_tasks({"written_sums": None}, manager)


def test_without_lm_eval_the_extra_is_named(place: Path) -> None:
    """One sentence with the command, where it is not installed."""
    if find_spec("lm_eval") is not None:
        pytest.skip("lm-eval is installed")
    with pytest.raises(EvaluationError, match=r"onebit\[zeroshot\]"):
        run(place)


def test_a_report_from_before_there_were_tasks_still_loads() -> None:
    """The field is optional, and lossless where it is there."""
    old = Report.from_dict({"layers": [], "seconds": {}, "evaluation": []})
    assert old.tasks == ()
    new = with_task(old, sample_task())
    assert Report.from_dict(json.loads(json.dumps(new.to_dict()))) == new
    assert isinstance(new.tasks[0], TaskResult)
