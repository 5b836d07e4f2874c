"""Jobs over HTTP on the real server: launch, follow, serve, cancel, refuse, survive."""

import os
import signal
import time
import urllib.request
from pathlib import Path

import openai
import pytest

from tests.support.admin import SMALL, Admin, children_named, has_ended, job_server, save_job_sources
from tests.support.server_process import running_server

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A folder jobs may read: a tiny model, a slow one (many blocks), a text."""
    return save_job_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def server(sources, tmp_path_factory):
    with job_server(tmp_path_factory.mktemp("server"), sources) as server:
        yield server


@pytest.fixture(scope="module")
def admin(server):
    return Admin(server.url)


def test_a_job_makes_an_artifact_that_answers(server, admin):
    """Launch, wait, complete: blocks are counted, the evaluation is done and shown, the model is served."""
    evaluate = {"texts": {"fox": "heldout.txt"}, "windows": 2, "window_tokens": 32}
    job_id = admin.submit(model="tiny", method="gptq", calibration=SMALL, name="made", evaluate=evaluate, load=True)
    seen = admin.wait(job_id, has_ended)
    last = seen[-1]
    assert last["state"] == "succeeded", last
    assert (last["blocks_completed"], last["blocks"]) == (2, 2)
    assert 0 < last["relative_error"] < 1
    assert last["artifact"].endswith("/root/made")
    assert [job["blocks_completed"] for job in seen] == sorted(job["blocks_completed"] for job in seen)
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    assert client.completions.create(model="made", prompt="fox", max_tokens=4).usage.completion_tokens > 0
    page = urllib.request.urlopen(server.url + "/metrics").read().decode()
    assert 'onebit_artifact_perplexity{dataset="fox",model="made",variant="compressed"}' in page
    assert 'onebit_jobs{state="succeeded"} 1.0' in page
    status, _ = admin.call("DELETE", "/admin/models/made")
    assert status == 200
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="made", prompt="fox")
    status, model = admin.call("POST", "/admin/models/load", {"path": "made", "name": "again"})
    assert (status, model["state"], model["method"]) == (200, "ready", "gptq")
    assert client.completions.create(model="again", prompt="fox", max_tokens=4).choices[0].finish_reason


def test_a_job_trains(admin):
    """All layers together, as the last stage; its steps are counted and its loss is told."""
    training = {"steps": 6, "batch": 2, "held_out": 2, "evaluate_every": 3, "text": ["builtin:python"]}
    asked = {"calibration": SMALL, "training": training, "name": "trained"}
    job_id = admin.submit(model="tiny", method="svid", **asked)
    job = admin.wait(job_id, has_ended)[-1]
    assert job["state"] == "succeeded", job
    assert (job["steps_completed"], job["steps"], job["blocks_completed"]) == (6, 6, 2)
    assert 0 < job["held_out_kl"] < 10


def test_a_running_job_is_cancelled(server, admin):
    """Its child ends, nothing half-written is left, and the next job runs."""
    job_id = admin.submit(model="slow", method="gptq", calibration=SMALL, name="never")
    admin.wait(job_id, lambda job: job["blocks_completed"] >= 1)
    status, job = admin.call("POST", f"/admin/jobs/{job_id}/cancel")
    assert (status, job["state"]) == (200, "cancelled")
    assert admin.call("POST", f"/admin/jobs/{job_id}/cancel")[0] == 200
    root = Path(server.log_file.parent / "root")
    deadline = time.monotonic() + 20
    while children_named("quantize", server.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [path.name for path in root.iterdir() if "never" in path.name] == []
    next_id = admin.submit(model="tiny", method="rtn", name="after")
    assert admin.wait(next_id, has_ended)[-1]["state"] == "succeeded"
    status, answer = admin.call("POST", f"/admin/jobs/{next_id}/cancel")
    assert (status, answer["error"]["code"]) == (409, "conflict")


def test_a_job_that_fails_says_why(sources, admin):
    """A model that cannot be read ends the job as failed, with the command's own sentence."""
    (sources / "broken").mkdir(exist_ok=True)
    (sources / "broken" / "config.json").write_text("{}")
    job_id = admin.submit(model="broken", method="rtn", name="broken")
    job = admin.wait(job_id, has_ended)[-1]
    assert job["state"] == "failed"
    assert "broken" in job["error"]
    assert "\n" not in job["error"]
    assert job["artifact"] is None


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"model": "tiny", "method": "magic"}, 400, "method"),
        ({"model": "tiny", "method": "rtn", "settings": {"bitz": 1}}, 400, "settings"),
        ({"model": "../../etc", "method": "rtn"}, 400, "model"),
        ({"model": "org/model", "method": "rtn"}, 400, "model"),
        ({"model": "tiny", "method": "rtn", "name": "a/b"}, 400, "name"),
        ({"model": "tiny", "method": "rtn", "embedding_bits": 5}, 400, "embedding_bits"),
        ({"model": "tiny", "method": "rtn", "calibration": {"samples": 0}}, 400, "calibration.samples"),
        ({"model": "tiny", "method": "rtn", "calibration": {"text": ["/etc/passwd"]}}, 400, "calibration.text"),
        ({"model": "tiny", "method": "rtn", "calibration": {"text": ["text.txt#../x"]}}, 400, "calibration.text"),
        (
            {"model": "tiny", "method": "gptq", "evaluate": {"texts": {"x": "builtin:python"}}},
            400,
            "evaluate.texts",
        ),
        ({"model": "tiny", "method": "rtn", "training": {"steps": -1}}, 400, "training.steps"),
        ({"model": "tiny", "method": "rtn", "training": {"steps": 1, "warmup": 1.0}}, 400, "training.warmup"),
        ({"model": "tiny", "method": "rtn", "training": {"steps": 1, "text": ["/etc/passwd"]}}, 400, "training.text"),
        ({"model": "tiny", "method": "rtn", "other": 1}, 400, "other"),
        ({"method": "rtn"}, 400, "model"),
    ],
)
def test_a_job_that_cannot_be_meant_is_not_queued(admin, body, status, param):
    """A 400 that names the option, and no job."""
    before = len(admin.call("GET", "/admin/jobs")[1]["data"])
    answered, answer = admin.call("POST", "/admin/quantize", body)
    assert (answered, answer["error"]["param"]) == (status, param)
    assert len(admin.call("GET", "/admin/jobs")[1]["data"]) == before


def test_an_unknown_job_is_a_404(admin):
    """Reading and cancelling."""
    assert admin.call("GET", "/admin/jobs/job-none")[0] == 404
    assert admin.call("POST", "/admin/jobs/job-none/cancel")[1]["error"]["code"] == "job_not_found"


def test_a_killed_worker_goes_on_with_its_job(server, admin):
    """A kill -9 of the worker ends its child too; a new worker finishes the job after the last finished block."""
    job_id = admin.submit(model="slow", method="gptq", calibration=SMALL, name="survivor")
    admin.wait(job_id, lambda job: job["blocks_completed"] >= 2)
    (worker,) = children_named("service.jobs.worker", server.pid)
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while children_named(job_id, 1):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job = admin.wait(job_id, has_ended)[-1]
    assert (job["state"], job["blocks_completed"]) == ("succeeded", 48), job


def test_a_stopped_server_goes_on_with_its_job(sources, tmp_path):
    """SIGTERM in the middle of a job ends everything with code 0; the next start of the server finishes the job."""
    arguments = ("--artifact-root", str(tmp_path / "root"), "--job-sources", str(sources))
    with running_server(*arguments, log_file=tmp_path / "first.log") as server:
        admin = Admin(server.url)
        job_id = admin.submit(model="slow", method="gptq", calibration=SMALL, name="continued")
        admin.wait(job_id, lambda job: job["blocks_completed"] >= 2)
        assert server.stop() == 0
    assert children_named(str(tmp_path), 1) == []
    with running_server(*arguments, log_file=tmp_path / "second.log") as server:
        job = Admin(server.url).wait(job_id, has_ended)[-1]
    assert (job["state"], job["blocks_completed"]) == ("succeeded", 48), job
