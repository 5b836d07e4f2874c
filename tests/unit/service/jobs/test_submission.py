"""What a job may be asked for: open folders, known methods, plain names."""

import json

import pytest

from onebit_core.calibration.sources import source_files
from service.errors import BadRequest, Conflict
from service.jobs.submission import Submission, plan_job, resolve_model, resolve_text
from service.jobs.types import Evaluation, JobSpec, Limits
from service.settings import Settings

JOB_ID = "job-" + "0" * 32


@pytest.fixture
def settings(tmp_path):
    for name in ("root", "sources/model", "secret"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sources/news.txt").write_text("news")
    (tmp_path / "secret/key.txt").write_text("key")
    (tmp_path / "sources/link").symlink_to(tmp_path / "secret")
    return Settings(artifact_root=tmp_path / "root", job_sources=[tmp_path / "sources"], device="cpu")


def submission(**changes):
    values = {
        "model": "model",
        "method": "rtn",
        "settings": {},
        "calibration": {},
        "reconstruction": {},
        "bits": None,
        "rotation": "off",
        "embedding_bits": 16,
        "name": "small",
        "evaluation": None,
        "load": True,
    }
    return Submission(**{**values, **changes})


def test_a_job_is_planned_completely(settings, tmp_path):
    """Paths are real, the configuration complete, and the whole survives JSON."""
    evaluation = Evaluation(texts={"news": "news.txt"}, windows=2, window_tokens=64)
    calibration = {"text": ["news.txt"], "samples": 3}
    limits = Limits(max_kl=0.5, max_bits=4)
    asked = submission(calibration=calibration, evaluation=evaluation, limits=limits, priority=7)
    spec = plan_job(JOB_ID, asked, settings)
    assert spec.folder == str(tmp_path / "root" / ".jobs" / JOB_ID)
    assert (spec.limits, spec.priority, spec.max_crashes) == (limits, 7, 3)
    assert spec.artifact == str(tmp_path / "root" / "small")
    assert spec.config["model"] == str(tmp_path / "sources" / "model")
    assert spec.config["calibration"]["text"] == [str(tmp_path / "sources" / "news.txt")]
    assert spec.config["calibration"]["samples"] == 3
    assert spec.config["settings"]["bits"]
    assert spec.config["device"] == "cpu"
    assert spec.evaluation.texts == {"news": str(tmp_path / "sources" / "news.txt")}
    assert JobSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    "path",
    [
        "missing",
        "../secret",
        "link",
        "link/key.txt",
        "/etc/passwd",
        "/etc",
        "file:///etc/passwd",
        "builtin:/../../etc/passwd",
        "builtin:other",
        "http://169.254.169.254/latest",
        "http://[::1]/x",
        "org/model",
        "a\x00b",
        "x" * 5000,
    ],
)
def test_nothing_outside_the_open_folders_is_read(settings, path):
    """Other folders, links out of ours, addresses and hub ids are refused alike."""
    for refused in (
        lambda: resolve_model(path, settings),
        lambda: resolve_text(path, settings, "calibration.text"),
    ):
        with pytest.raises(BadRequest, match="job_sources"):
            refused()


def test_what_exists_elsewhere_is_not_told(settings, tmp_path):
    """The refusal of a file that exists is that of one that does not."""
    messages = []
    for path in (str(tmp_path / "secret/key.txt"), str(tmp_path / "secret/none.txt")):
        with pytest.raises(BadRequest) as refused:
            resolve_model(path, settings)
        messages.append(refused.value.message)
    assert messages[0] == messages[1]


def test_hub_ids_need_leave(settings):
    """A hub id passes only where the operator allows downloads, and only in the form of one."""
    opened = settings.model_copy(update={"allow_hub": True})
    assert resolve_model("org/model-1.5", opened) == "org/model-1.5"
    for bad in ("org/../x", "https://hub/org/model", "org/model/extra", "-x/y", "org/"):
        with pytest.raises(BadRequest):
            resolve_model(bad, opened)


@pytest.mark.parametrize(
    "text",
    [
        "link#text",
        "link/key.txt#text",
        "link/key.txt#",
        "../secret/key.txt#text",
        "news.txt#/../../secret/key.txt",
        "news.txt#text/../../secret/key.txt",
        "news.txt#a\nb",
        "news.txt#a\x00b",
        "#text",
        "#",
        "self:",
        "self:#text",
        "self:/../../secret/key.txt",
        "builtin:python#text",
        "out",
        "out#text",
        "saved",
        "marked#key.txt",
        "marked#key.txt#",
        "marked#key.txt#text",
    ],
)
def test_a_column_does_not_lead_out_of_the_open_folders(settings, tmp_path, text):
    """Nor does a link in a folder, a file that a data set's state names, or a name with a # in it."""
    sources = tmp_path / "sources"
    for name in ("out", "saved"):
        (sources / name).mkdir()
    (sources / "out/inner.txt").symlink_to(tmp_path / "secret/key.txt")
    (sources / "saved/x.arrow").symlink_to(tmp_path / "secret/key.txt")
    (sources / "saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "../../secret/x.arrow"}]}))
    (sources / "marked#key.txt").symlink_to(tmp_path / "secret/key.txt")
    with pytest.raises(BadRequest) as refused:
        resolve_text(text, settings, "evaluate.texts")
    assert str(tmp_path / "secret") not in refused.value.message


def test_what_is_checked_is_what_is_opened(settings, tmp_path):
    """The core finds in the resolved source the very path that was checked, and the column."""
    sources = tmp_path / "sources"
    (sources / "qa.jsonl").write_text('{"answer": "a"}')
    (sources / "odd#name.txt").write_text("odd")
    (sources / "plain.txt").symlink_to(sources / "odd#name.txt")
    assert resolve_text("qa.jsonl#answer", settings, "x") == f"{sources}/qa.jsonl#answer"
    for name in ("odd#name.txt#", "plain.txt"):
        source = resolve_text(name, settings, "x")
        assert source == f"{sources}/odd#name.txt#"
        assert source_files(source) == [sources / "odd#name.txt"]


def test_the_model_may_write_what_it_is_calibrated_on(settings):
    """self: passes as calibration text, mixed with a file by weight."""
    calibration = {"text": ["self:", "news.txt"], "weights": [3, 1]}
    spec = plan_job(JOB_ID, submission(method="gptq", calibration=calibration), settings)
    assert spec.config["calibration"]["text"][0] == "self:"
    assert spec.config["calibration"]["weights"] == [3.0, 1.0]
    for weights in ([1], [1, 0], [1, -1]):
        with pytest.raises(BadRequest, match="weights") as refused:
            plan_job(JOB_ID, submission(method="gptq", calibration={**calibration, "weights": weights}), settings)
        assert refused.value.param == "calibration"


@pytest.mark.parametrize(
    ("calibration", "text"),
    [
        ({"text": ["news.txt"]}, "news.txt"),
        ({"text": ["self:", "news.txt"]}, "copy.md"),
        ({"text": ["news"]}, "news/inner.txt"),
        ({}, "builtin:python"),
    ],
)
def test_a_model_is_not_measured_on_what_it_is_calibrated_on(settings, tmp_path, calibration, text):
    """Same file, copy, file in the folder, or the default text; a method that does not calibrate may be."""
    sources = tmp_path / "sources"
    (sources / "copy.md").write_text("news")
    (sources / "news").mkdir()
    (sources / "news/inner.txt").write_text("inner")
    job = {"calibration": calibration, "evaluation": Evaluation(texts={"t": text}, windows=1, window_tokens=2)}
    for changes in ({"method": "gptq"}, {"method": "rtn", "reconstruction": {"preset": "light"}}):
        with pytest.raises(BadRequest, match="t is also calibrated on") as refused:
            plan_job(JOB_ID, submission(**job, **changes), settings)
        assert refused.value.param == "evaluate.texts"
    assert plan_job(JOB_ID, submission(**job, method="rtn"), settings)


def test_training_is_planned_and_its_texts_are_no_measure(settings, tmp_path):
    """Texts of a training are resolved like others, and a model is not measured on them."""
    training = {"steps": 5, "text": ["news.txt", "self:"]}
    spec = plan_job(JOB_ID, submission(training=training), settings)
    assert spec.config["training"]["text"] == [str(tmp_path / "sources" / "news.txt"), "self:"]
    assert spec.config["training"]["steps"] == 5
    job = {"training": training, "evaluation": Evaluation(texts={"t": "news.txt"}, windows=1, window_tokens=2)}
    with pytest.raises(BadRequest, match="t is also trained on"):
        plan_job(JOB_ID, submission(**job), settings)
    for wrong, param in (({"steps": 5, "text": ["../secret/key.txt"]}, "training.text"), ({"batch": 0}, "training")):
        with pytest.raises(BadRequest) as refused:
            plan_job(JOB_ID, submission(training=wrong), settings)
        assert refused.value.param == param


def test_built_in_texts_pass(settings):
    """A text that ships with the core is no path."""
    assert resolve_text("builtin:python", settings, "x") == "builtin:python"


@pytest.mark.parametrize(
    ("changes", "param", "part"),
    [
        ({"method": "svd"}, "method", "rtn"),
        ({"settings": {"bitz": 3}}, "settings", "bitz"),
        ({"settings": {"bits": "three"}}, "settings", "bits"),
        ({"settings": {"bits": 99}}, "settings", "bits"),
        ({"embedding_bits": 3}, "settings", "embedding_bits"),
        ({"name": "../x"}, "name", "letters"),
        ({"name": ".hidden"}, "name", "letters"),
        ({"name": "x" * 65}, "name", "64"),
        (
            {"evaluation": Evaluation(texts={"a=b": "news.txt"}, windows=1, window_tokens=2)},
            "evaluate.texts",
            "letters",
        ),
        ({"limits": Limits(max_kl=1.0)}, "limits.max_kl", "evaluate"),
        ({"limits": Limits(min_top1=0.5)}, "limits.min_top1", "evaluate"),
        ({"limits": Limits(max_bits=2.0), "bits": 3.0}, "limits.max_bits", "bits asks for 3"),
        ({"evaluation": Evaluation(texts={"a": "none"}, windows=1, window_tokens=2)}, "evaluate.texts", "job_sources"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_it_is_queued(settings, changes, param, part):
    """Unknown methods and settings, odd names, missing texts: a 400 that names the option."""
    with pytest.raises(BadRequest, match=part) as refused:
        plan_job(JOB_ID, submission(**changes), settings)
    assert refused.value.param == param


def test_an_existing_name_is_a_conflict(settings, tmp_path):
    """No job overwrites an artifact, nor follows a link in its place."""
    (tmp_path / "root" / "small").mkdir()
    (tmp_path / "root" / "dangling").symlink_to(tmp_path / "none")
    for name in ("small", "dangling"):
        with pytest.raises(Conflict):
            plan_job(JOB_ID, submission(name=name), settings)


def test_a_name_is_made_from_model_and_method(settings):
    """Without a name the model's folder and the method give one."""
    assert plan_job(JOB_ID, submission(name=None), settings).name == "model-rtn"


def test_a_job_recorded_by_an_older_version_is_read():
    """What was queued before limits and priorities existed runs without them."""
    old = {"name": "a", "artifact": "/a", "folder": "/f", "config": {}, "evaluation": None, "load": False}
    assert JobSpec.from_dict(old) == JobSpec(**old)
    assert not JobSpec.from_dict(old).has_limits
