"""What a job promises beside making an artifact: keys, limits, events, log, order, an end for jobs that kill."""

import json
import os
import random
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from onebit_core.artifact.identity import read_manifest
from tests.support.admin import SMALL, Admin, children_named, has_ended, job_server, save_job_sources
from tests.support.server_process import run_server_to_end

pytestmark = pytest.mark.acceptance

LAYERS = 8
EVALUATE = {"texts": {"fox": "heldout.txt"}, "windows": 2, "window_tokens": 32}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return save_job_sources(tmp_path_factory.mktemp("sources"), slow_layers=LAYERS)


@pytest.fixture(scope="module")
def server(sources, tmp_path_factory):
    with job_server(tmp_path_factory.mktemp("server"), sources) as server:
        yield server


@pytest.fixture(scope="module")
def admin(server):
    return Admin(server.url)


@pytest.fixture(scope="module")
def root(server):
    return server.log_file.parent / "root"


def test_a_job_outside_its_limits_is_rejected(server, admin, root):
    """It keeps its report and its artifact, apart from what can be served; a key finds it again, DELETE forgets it."""
    body = {"model": "tiny", "method": "rtn", "name": "lossy", "load": True}
    body |= {"evaluate": EVALUATE, "limits": {"max_kl": 1e-9, "max_bits": 99}}
    status, job = admin.call("POST", "/admin/quantize", body, Idempotency_Key="order-1")
    assert (status, job["report"]) == (202, None)
    job = admin.wait(job["id"], has_ended)[-1]
    assert job["state"] == "rejected", job
    assert "KL divergence on fox" in job["error"]
    assert "max_kl is 1e-09" in job["error"]
    (text,) = job["report"]["evaluation"]
    assert (text["dataset"], text["kl_mean"] > 1e-9) == ("fox", True)
    assert job["report"]["bits_per_weight"] > job["report"]["linear_bits_per_weight"] > 1
    folder = root / ".jobs" / job["id"]
    assert job["artifact"] == str(folder / "artifact")
    assert read_manifest(folder / "artifact").method == "rtn"
    assert not (root / "lossy").exists()
    status, answer = admin.call("POST", "/admin/models/load", {"path": f".jobs/{job['id']}/artifact"})
    assert (status, answer["error"]["param"]) == (400, "path")
    assert "lossy" not in [model["id"] for model in admin.call("GET", "/v1/models")[1]["data"]]
    again = admin.call("POST", "/admin/quantize", body, Idempotency_Key="order-1")
    assert again == (200, job)
    status, answer = admin.call("POST", "/admin/quantize", {**body, "load": False}, Idempotency_Key="order-1")
    assert (status, answer["error"]["param"]) == (409, "Idempotency-Key")
    assert "order-1" in answer["error"]["message"]
    assert admin.call("POST", "/admin/quantize", body, Idempotency_Key="a b")[0] == 400
    assert admin.call("POST", f"/admin/jobs/{job['id']}/resume")[0] == 409
    page = urllib.request.urlopen(server.url + "/metrics").read().decode()
    assert 'onebit_jobs{state="rejected"} 1.0' in page
    assert admin.call("DELETE", f"/admin/jobs/{job['id']}")[1] == {"id": job["id"], "object": "job", "deleted": True}
    assert admin.call("GET", f"/admin/jobs/{job['id']}")[0] == 404
    assert not folder.exists()


def test_a_job_is_too_large_before_it_is_evaluated(admin, root):
    """Bits are counted right after the artifact is written; one that keeps to its limits gets its name."""
    large = admin.submit(model="tiny", method="rtn", name="large", limits={"max_bits": 2}, evaluate=EVALUATE)
    small = admin.submit(model="tiny", method="rtn", name="fits", limits={"max_bits": 32})
    job = admin.wait(large, has_ended)[-1]
    assert (job["state"], job["report"]["evaluation"]) == ("rejected", [])
    assert "max_bits is 2" in job["error"]
    job = admin.wait(small, has_ended)[-1]
    assert (job["state"], job["artifact"]) == ("succeeded", str(root / "fits"))
    assert read_manifest(root / "fits").name == "fits"
    assert not (root / ".jobs" / small / "artifact").exists()


def test_fifty_posts_with_one_key_are_one_job(admin):
    """In parallel; all answers name it."""
    body = {"model": "tiny", "method": "rtn", "name": "once"}
    with ThreadPoolExecutor(50) as threads:
        posts = [threads.submit(admin.call, "POST", "/admin/quantize", body, Idempotency_Key="once") for _ in range(50)]
        answers = [post.result() for post in posts]
    assert sorted({status for status, _ in answers}) == [200, 202], answers
    assert [status for status, _ in answers].count(202) == 1
    assert len({job["id"] for _, job in answers}) == 1
    made = [job for job in admin.call("GET", "/admin/jobs")[1]["data"] if job["name"] == "once"]
    assert len(made) == 1
    admin.wait(made[0]["id"], has_ended)


def test_a_job_is_followed_to_its_end(admin):
    """Events tell every state once and end; coming back with the last id repeats nothing; the log can be read on."""
    job_id = admin.submit(model="slow", method="gptq", calibration=SMALL, name="followed")
    stream, headers = admin.text(f"/admin/jobs/{job_id}/events")
    assert headers["content-type"].startswith("text/event-stream")
    events = [
        dict(line.split(": ", 1) for line in block.splitlines()) for block in stream.split("\n\n") if "data:" in block
    ]
    jobs = [json.loads(event["data"]) for event in events]
    assert [event["event"] for event in events] == ["progress"] * (len(events) - 1) + ["end"]
    assert len({event["id"] for event in events}) == len(events)
    assert jobs[-1] == admin.job(job_id)
    assert (jobs[-1]["state"], jobs[-1]["blocks_completed"]) == ("succeeded", LAYERS)
    blocks = [job["blocks_completed"] for job in jobs]
    assert blocks == sorted(blocks)
    assert {0, LAYERS} <= set(blocks)
    again, _ = admin.text(f"/admin/jobs/{job_id}/events", Last_Event_ID=events[-1]["id"])
    assert again.count("event: end") == 1
    log, headers = admin.text(f"/admin/jobs/{job_id}/log")
    assert int(headers["x-log-size"]) == int(headers["x-next-offset"]) == len(log.encode())
    assert admin.text(f"/admin/jobs/{job_id}/log?offset={headers['x-next-offset']}")[0] == ""
    for query in ("tail=0", "offset=-1", "limit=99999999", "tail=1&offset=1"):
        assert admin.call("GET", f"/admin/jobs/{job_id}/log?{query}")[0] == 400
    for path in ("events", "log"):
        assert admin.call("GET", f"/admin/jobs/..%2f{job_id}/{path}")[0] == 404


def test_random_kills_change_no_byte(server, admin, root):
    """Worker and command are killed again and again; the artifact is that of an undisturbed job, bit for bit.

    Of a job, for it has as many threads: another number of them adds up in another order on some processors.
    """
    job_id = admin.submit(model="slow", method="gptq", calibration=SMALL, name="survivor")
    seed = random.randrange(1 << 32)
    draw, kills, last = random.Random(seed), 0, -1
    while not has_ended(job := admin.job(job_id)):
        # Each kill after another finished block: a job that never gets on would rightly be given up.
        if job["blocks_completed"] > last and kills < 4:
            victims = children_named(job_id, 1) + children_named("service.jobs.worker", server.pid)
            victims = [victim for victim in victims if draw.random() < 0.7]
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
            kills += bool(victims)
            last = job["blocks_completed"] if victims else last
        time.sleep(draw.uniform(0.1, 0.6))
    assert (job["state"], job["blocks_completed"]) == ("succeeded", LAYERS), (seed, job)
    assert kills >= 2, seed
    undisturbed = admin.submit(model="slow", method="gptq", calibration=SMALL, name="undisturbed")
    assert admin.wait(undisturbed, has_ended)[-1]["state"] == "succeeded"
    ours, theirs = (read_manifest(root / name) for name in ("survivor", "undisturbed"))
    assert (ours.sha256, ours.golden_sha256) == (theirs.sha256, theirs.golden_sha256), seed


def test_a_job_that_kills_ends_and_the_queue_moves_on(admin):
    """Its command dies at the same place each time it is started; after three times it has failed, and says why."""
    poison = admin.submit(model="slow", method="gptq", calibration=SMALL, name="poison", priority=5)
    other = admin.submit(model="tiny", method="rtn", name="patient")
    while not has_ended(job := admin.job(poison)):
        for victim in children_named(poison, 1):
            os.kill(victim, signal.SIGKILL)
        time.sleep(0.02)
    assert job["state"] == "failed"
    assert "3 times in a row with nothing finished between" in job["error"]
    assert admin.wait(other, has_ended)[-1]["state"] == "succeeded"
    status, job = admin.call("POST", f"/admin/jobs/{poison}/resume")
    assert (status, job["error"]) == (202, None)
    admin.wait(poison, lambda job: job["blocks_completed"] >= 1)
    assert admin.call("POST", f"/admin/jobs/{poison}/cancel")[0] == 200


def test_the_queue_is_in_order_of_priority(admin):
    """While one job runs others wait; the larger priority runs first, then who came first."""
    admin.submit(model="slow", method="gptq", calibration=SMALL, name="first")
    waiting = {
        name: admin.submit(model="tiny", method="rtn", name=name, priority=priority)
        for name, priority in (("low", -1), ("usual", 0), ("high", 9), ("later", 0))
    }
    ended = {name: admin.wait(job_id, has_ended)[-1] for name, job_id in waiting.items()}
    assert {job["state"] for job in ended.values()} == {"succeeded"}
    assert sorted(ended, key=lambda name: ended[name]["updated"]) == ["high", "usual", "later", "low"]
    status, page = admin.call("GET", "/admin/jobs?state=succeeded&method=rtn&model=tiny&limit=2")
    assert (status, len(page["data"]), page["has_more"]) == (200, 2, True)
    status, answer = admin.call("GET", "/admin/jobs?state=done")
    assert (status, answer["error"]["param"]) == (400, "state")


def test_a_second_server_on_the_same_record_is_refused(server, root):
    """It ends and says what to do; the first one is not disturbed."""
    ended = run_server_to_end("--artifact-root", str(root), "--port", "0")
    assert ended.returncode == 2
    assert "another server or worker with this one's worker id uses the jobs' database" in ended.stderr
    assert server.status("/health/ready") == 200
