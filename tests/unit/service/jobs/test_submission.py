"""What a job may be asked for: open folders, known methods, plain names."""

import pytest

from service.errors import BadRequest, Conflict
from service.jobs.submission import Submission, plan_job, resolve_model, resolve_text
from service.jobs.types import Evaluation, JobSpec
from service.settings import Settings


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
        "embedding_bits": 16,
        "name": "small",
        "evaluation": None,
        "load": True,
    }
    return Submission(**{**values, **changes})


def test_a_job_is_planned_completely(settings, tmp_path):
    """Paths are real, the configuration complete, and the whole survives JSON."""
    evaluation = Evaluation(texts={"news": "news.txt"}, windows=2, window_tokens=64)
    spec = plan_job(submission(calibration={"text": ["news.txt"], "samples": 3}, evaluation=evaluation), settings)
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
        ({"evaluation": Evaluation(texts={"a": "none"}, windows=1, window_tokens=2)}, "evaluate.texts", "job_sources"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_it_is_queued(settings, changes, param, part):
    """Unknown methods and settings, odd names, missing texts: a 400 that names the option."""
    with pytest.raises(BadRequest, match=part) as refused:
        plan_job(submission(**changes), settings)
    assert refused.value.param == param


def test_an_existing_name_is_a_conflict(settings, tmp_path):
    """No job overwrites an artifact, nor follows a link in its place."""
    (tmp_path / "root" / "small").mkdir()
    (tmp_path / "root" / "dangling").symlink_to(tmp_path / "none")
    for name in ("small", "dangling"):
        with pytest.raises(Conflict):
            plan_job(submission(name=name), settings)


def test_a_name_is_made_from_model_and_method(settings):
    """Without a name the model's folder and the method give one."""
    assert plan_job(submission(name=None), settings).name == "model-rtn"
