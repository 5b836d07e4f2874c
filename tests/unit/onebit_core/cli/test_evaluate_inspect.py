"""`onebit evaluate` and `onebit inspect` on a real artifact of a tiny model."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from onebit_core.artifact.reader import read_report
from onebit_core.artifact.writer import update_report
from onebit_core.cli.evaluate import parse_tasks, parse_texts
from onebit_core.cli.main import app
from onebit_core.errors import ConfigError, EvaluationError, OnebitError
from onebit_core.evaluation.run import with_task
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.run import quantize_model
from tests.support.sample_report import sample_task
from tests.support.tiny_model import save_tiny_model

SIZES = ["--windows", "2", "--window-tokens", "32"]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    model = save_tiny_model(folder / "original")
    quantize_model(QuantizeConfig(model=str(model), method="rtn", name="[bold]tiny"), folder / "artifact")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 10)
    return folder


@pytest.fixture
def place(made_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_once, tmp_path / "place"))


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})
    if isinstance(result.exception, OnebitError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def evaluate(place: Path, name: str = "fox", *options: str) -> str:
    return run(
        "evaluate", place / "artifact", "--text", f"{name}={place / 'text.txt'}", *SIZES, "--progress", "none", *options
    )


def test_evaluate_writes_into_the_artifact_and_prints_a_table(place: Path) -> None:
    """The original is found where the artifact says; the report gains one result."""
    printed = evaluate(place)

    (result,) = read_report(place / "artifact").evaluation
    assert (result.dataset, result.windows, result.window_tokens, result.tokens) == ("fox", 2, 32, 62)
    assert result.kl_mean > 0
    assert f"{result.compressed.value:.4g}" in printed


def test_evaluating_again_replaces_and_another_text_adds(place: Path) -> None:
    """Same name and tokens: one result. Another name: another result."""
    evaluate(place)
    evaluate(place)
    evaluate(place, "other")

    assert [result.dataset for result in read_report(place / "artifact").evaluation] == ["fox", "other"]


def test_evaluate_speaks_json_lines(place: Path) -> None:
    """Progress of stage evaluate, then a result with the artifact's path."""
    printed = run("evaluate", place / "artifact", "--text", f"fox={place / 'text.txt'}", *SIZES, "--progress", "json")
    events: list[dict[str, Any]] = [json.loads(line) for line in printed.splitlines()]

    assert {"stage": "evaluate", "done": 2, "total": 2}.items() <= events[-2].items()
    assert events[-1]["event"] == "result"
    assert events[-1]["artifact"] == str(place / "artifact")
    assert events[-1]["evaluation"][0]["dataset"] == "fox"


def test_a_text_that_was_calibrated_on_is_marked(place: Path) -> None:
    """By its file or by its words; in the report, in the tables and on the page. Other text is not."""
    text = place / "text.txt"
    calibration = {"text": [str(text)], "samples": 2, "tokens": 32}
    config = {"model": str(place / "original"), "method": "gptq", "calibration": calibration}
    quantize_model(QuantizeConfig.from_dict(config), place / "calibrated")
    (place / "copy.md").write_text(text.read_text())
    (place / "other.txt").write_text("Pack my box with five dozen liquor jugs. " * 10)
    texts = [part for name in ("text.txt", "copy.md", "other.txt") for part in ("--text", f"{name}={place / name}")]
    printed = run("evaluate", place / "calibrated", *texts, *SIZES, "--progress", "none")

    found = {result.dataset: result.warning for result in read_report(place / "calibrated").evaluation}
    assert found["other.txt"] is None
    assert found["text.txt"] == found["copy.md"]
    assert f"was calibrated on this text ({text})" in str(found["copy.md"])
    page = place / "page.html"
    for shown in (printed, run("inspect", place / "calibrated", "--html", page), page.read_text()):
        assert shown.count("the model was calibrated on this text") == 2


def test_a_file_that_holds_other_text_now_is_not_marked(place: Path) -> None:
    """Its fingerprint says that it is not the text that was calibrated on."""
    text = place / "text.txt"
    calibration = {"text": [str(text)], "samples": 2, "tokens": 32}
    config = {"model": str(place / "original"), "method": "gptq", "calibration": calibration}
    quantize_model(QuantizeConfig.from_dict(config), place / "calibrated")
    text.write_text("Pack my box with five dozen liquor jugs. " * 10)
    run("evaluate", place / "calibrated", "--text", f"fox={text}", *SIZES, "--progress", "none")

    (result,) = read_report(place / "calibrated").evaluation
    assert result.warning is None


def test_a_text_that_is_too_short_is_refused_and_nothing_is_written(place: Path) -> None:
    """One sentence with the numbers; the report stays as it was."""
    with pytest.raises(EvaluationError, match="450 tokens, too few for 100 windows"):
        evaluate(place, "fox", "--windows", "100")
    assert read_report(place / "artifact").evaluation == ()


def test_a_lost_original_is_asked_for(place: Path, made_once: Path) -> None:
    """The recorded original may have moved since; the remedy is in the message."""
    manifest = place / "artifact" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(made_once / "original"), "/gone"))

    with pytest.raises(EvaluationError, match=r"/gone.*--original"):
        evaluate(place)
    evaluate(place, "fox", "--original", str(place / "original"))


def test_a_changed_original_is_not_taken_silently(place: Path) -> None:
    """The recorded folder holds other weights now; comparing with it would prove nothing."""
    manifest = place / "artifact" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["source"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(values))

    with pytest.raises(EvaluationError, match="other weights now"):
        evaluate(place)


@pytest.mark.parametrize("argument", ["news.txt", "=news.txt", "news="])
def test_texts_need_a_name_and_a_file(argument: str) -> None:
    """The message shows the form."""
    with pytest.raises(ConfigError, match="expected NAME=FILE"):
        parse_texts([argument])


def test_a_name_given_twice_is_refused() -> None:
    """Otherwise one of the two would disappear."""
    with pytest.raises(ConfigError, match="given twice"):
        parse_texts(["a=1.txt", "a=2.txt"])


def test_tasks_are_names_with_or_without_a_file() -> None:
    """A name alone is one of lm-eval's; other forms and names given twice are refused."""
    assert parse_tasks(["piqa", "mine=questions=1.jsonl"]) == {"piqa": None, "mine": "questions=1.jsonl"}
    for wrong in ("=questions.jsonl", "mine=", ""):
        with pytest.raises(ConfigError, match="expected NAME=FILE"):
            parse_tasks([wrong])
    with pytest.raises(ConfigError, match="given twice"):
        parse_tasks(["piqa", "piqa=questions.jsonl"])


def test_nothing_to_evaluate_on_is_refused(place: Path) -> None:
    """Neither text nor task: the message names both."""
    with pytest.raises(EvaluationError, match="name a text as NAME=FILE, or a zero-shot task"):
        run("evaluate", place / "artifact")


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval (extra `zeroshot`) is not installed")
@pytest.mark.filterwarnings("ignore:.*:Warning:lm_eval", "ignore:.*:Warning:datasets")
def test_evaluate_asks_questions_beside_texts(place: Path) -> None:
    """Both stand in the result and in the report."""
    questions = place / "questions.jsonl"
    questions.write_text(
        "".join(json.dumps({"question": f"{n}?", "choices": ["a", "b"], "gold": n % 2}) + "\n" for n in range(9))
    )
    text = f"fox={place / 'text.txt'}"
    printed = run(
        "evaluate", place / "artifact", "--text", text, *SIZES, "--task", f"mine={questions}", "--task-limit", "5",
        "--progress", "json",
    )  # fmt: skip
    result = json.loads(printed.splitlines()[-1])

    assert (result["evaluation"][0]["dataset"], result["tasks"][0]["task"]) == ("fox", "mine")
    assert read_report(place / "artifact").to_dict()["tasks"] == result["tasks"]
    assert result["tasks"][0]["questions"] == 5
    assert "zero-shot accuracy" in run("evaluate", place / "artifact", "--task", f"mine={questions}")


def test_inspect_shows_tasks(place: Path) -> None:
    """An artifact with tasks alone is evaluated."""
    update_report(place / "artifact", with_task(read_report(place / "artifact"), sample_task()))
    printed = run("inspect", place / "artifact")

    assert "arc_easy" in printed
    assert "not evaluated yet" not in printed


def test_inspect_shows_bits_bytes_and_layers(place: Path) -> None:
    """Names are shown as they are, even if they look like markup."""
    printed = run("inspect", place / "artifact")

    for shown in ("[bold]tiny", "bits per weight", "bytes and bits by part", "codes", "down_proj", "not evaluated yet"):
        assert shown in printed


def test_inspect_json_is_manifest_and_report(place: Path) -> None:
    """What a program reads is exactly what the artifact holds."""
    evaluate(place)
    values = json.loads(run("inspect", place / "artifact", "--json"))

    assert values["manifest"] == json.loads((place / "artifact" / "manifest.json").read_text())
    assert values["report"] == json.loads((place / "artifact" / "report.json").read_text())


def test_inspect_writes_the_page(place: Path, tmp_path: Path) -> None:
    """One HTML file, and a word about where it is."""
    printed = run("inspect", place / "artifact", "--html", tmp_path / "page.html")

    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert "page.html" in printed


def test_inspect_says_why_a_page_cannot_be_written(place: Path, tmp_path: Path) -> None:
    """A folder that does not exist is not made silently."""
    with pytest.raises(ConfigError, match="cannot be written"):
        run("inspect", place / "artifact", "--html", tmp_path / "missing" / "page.html")
