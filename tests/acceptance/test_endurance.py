"""Half an hour of work leaves a server as it was: memory, descriptors and the slowest answers stay flat.

Clients ask without pause, whole and in streams, with and without a grammar; some leave in the middle. In every window
a job makes an artifact, which is loaded, asked, unloaded and deleted. At the end of a window all of the server is
measured; the windows at the start, in which caches grow to their size, are left out. (A tokenizer keeps the last ten
thousand words it saw. To the tiny model's a whole prompt is a word of 4 KiB, so up to 40 MiB; to a real model's a few
hundred bytes.)
"""

import asyncio
import contextlib
import random
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import httpx2
import psutil
import pytest

from benchmarks.kernel_bench.device import device_name
from benchmarks.kernel_bench.results import write_table
from onebit_core.errors import ModelNotFound
from onebit_core.model.sample import sample_model_path
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.run import quantize_model
from tests.support.admin import Admin, has_ended, save_job_sources
from tests.support.live_metrics import LiveMetrics
from tests.support.server_process import running_server

pytestmark = [pytest.mark.acceptance, pytest.mark.soak]

MIB = 1 << 20
TOKENS = 24
LEAVING = 0.1
SPARE_DESCRIPTORS = 3
GROWTH_MIB = 24.0
"""Of the server with its engine, from the middle of the run to its end: what an allocator may still move."""
SLOWER = 1.25
"""The 99th percentile at the end over that of the middle, medians over windows."""
BUSY_ELSEWHERE = 0.15
QUIET_WINDOWS = 3
"""Answers are as slow as the machine is busy, so speed is compared over windows in which it did little else."""
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@dataclass(frozen=True, kw_only=True)
class Window:
    """What one window saw, and what the server held at its end.

    Attributes:
        device: processor with its instruction sets.
        date: of the window's end, UTC.
        seconds: since the start.
        answers: whole ones.
        left: streams that the client closed early.
        p50_ms, p99_ms: of the time to a whole answer.
        server_mib, engine_mib: private memory of the server's process and of its engine.
        descriptors: of both.
        others: share of the machine's processors that something else than this test used.
    """

    device: str
    date: str
    seconds: float
    answers: int
    left: int
    p50_ms: float
    p99_ms: float
    server_mib: float
    engine_mib: float
    descriptors: int
    others: float


class Clients:
    """Ask until told to stop; times of whole answers are kept until somebody takes them."""

    def __init__(self, url: str, model: str, count: int) -> None:
        self._count = count
        self._url = url + "/v1/completions"
        self._model = model
        self._is_over = False
        self.times: list[float] = []
        self.left = 0

    async def run(self) -> None:
        """Ask, all clients at once."""
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._ask(client, random.Random(number)) for number in range(self._count)))

    def stop(self) -> None:
        """Let each finish what it waits for."""
        self._is_over = True

    def take(self) -> tuple[list[float], int]:
        """Return what was seen since the last call."""
        taken, self.times = self.times, []
        left, self.left = self.left, 0
        return taken, left

    async def _ask(self, client: httpx2.AsyncClient, draw: random.Random) -> None:
        while not self._is_over:
            words = " ".join(draw.choice(("river", "lamp", "clerk", "shelf")) for _ in range(draw.randrange(4, 40)))
            body = {"model": self._model, "prompt": words, "max_tokens": TOKENS, "ignore_eos": True}
            body |= {"seed": draw.randrange(1 << 30), "stream": draw.random() < 0.5}
            if draw.random() < 0.1:
                body |= {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}
                body["ignore_eos"] = False
            started = time.monotonic()
            if body["stream"] and draw.random() < LEAVING:
                await self._leave(client, body, draw.uniform(0, 0.2))
                continue
            answer = await client.post(self._url, json=body)
            assert answer.status_code == 200, answer.text
            assert not body["stream"] or answer.content.endswith(b"data: [DONE]\n\n"), answer.text[-200:]
            self.times.append(time.monotonic() - started)

    async def _leave(self, client: httpx2.AsyncClient, body: dict, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), client.stream("POST", self._url, json=body) as answer:
                async for _ in answer.aiter_raw():
                    pass
        self.left += 1


def one_job(admin: Admin, name: str) -> None:
    """Make an artifact, load it, ask it, unload it, delete it."""
    job_id = admin.submit(model="tiny", method="rtn", name=name)
    job = admin.wait(job_id, has_ended)[-1]
    assert job["state"] == "succeeded", job
    assert admin.call("POST", "/admin/models/load", {"path": name})[0] == 200
    body = {"model": name, "prompt": "fox", "max_tokens": 4}
    assert admin.call("POST", "/v1/completions", body)[0] == 200
    assert admin.call("DELETE", f"/admin/models/{name}")[0] == 200
    deadline = time.monotonic() + 60
    while (answer := admin.call("DELETE", f"/admin/artifacts/{name}"))[0] == 409:  # its last request is being finished
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)
    assert answer[0] == 200, answer
    assert admin.call("DELETE", f"/admin/jobs/{job_id}")[0] == 200


class Processors:
    """What share of the processors somebody else used since the last question."""

    def __init__(self) -> None:
        self._last = self._seconds()

    def others(self) -> float:
        """Return it; children of children that came and went between two questions are seen by their parents."""
        (at, busy, own), self._last = self._last, self._seconds()
        spent = (self._last[1] - busy) - (self._last[2] - own)
        return max(0.0, spent / (self._last[0] - at) / psutil.cpu_count())

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        whole, me = psutil.cpu_times(), psutil.Process()
        own = [one.cpu_times() for one in (me, *me.children(recursive=True))]
        busy = sum(whole) - whole.idle - getattr(whole, "iowait", 0) - getattr(whole, "guest", 0)
        return (
            time.monotonic(),
            busy,
            sum(one.user + one.system + one.children_user + one.children_system for one in own),
        )


def measured(
    server, engine: psutil.Process, started: float, taken: tuple[list[float], int], processors: Processors
) -> Window:
    """Look at the server's processes."""
    times, left = sorted(taken[0]), taken[1]
    main = psutil.Process(server.pid)
    return Window(
        device=device_name("cpu"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 1),
        answers=len(times),
        left=left,
        p50_ms=round(1000 * statistics.median(times), 1),
        p99_ms=round(1000 * times[int(0.99 * (len(times) - 1))], 1),
        server_mib=round(main.memory_full_info().uss / MIB, 1),
        engine_mib=round(engine.memory_full_info().uss / MIB, 1),
        descriptors=main.num_fds() + engine.num_fds(),
        others=round(processors.others(), 3),
    )


async def windows_of(server, clients: Clients, count: int, seconds: float, file) -> list[Window]:
    """Run the clients, and a job in each window; write a line a window."""
    (engine,) = [
        one for one in psutil.Process(server.pid).children() if "multiprocessing.spawn" in " ".join(one.cmdline())
    ]
    admin, processors, started = Admin(server.url), Processors(), time.monotonic()
    asking = asyncio.create_task(clients.run())
    windows: list[Window] = []
    try:
        for number in range(count):
            job = asyncio.create_task(asyncio.to_thread(one_job, admin, f"made-{number}"))
            until = asyncio.create_task(asyncio.sleep(seconds))
            await asyncio.wait([asking, until], return_when=asyncio.FIRST_COMPLETED)
            assert not asking.done(), asking.exception()
            await job
            windows.append(await asyncio.to_thread(measured, server, engine, started, clients.take(), processors))
            write_table(file, [asdict(window) for window in windows])
    finally:
        clients.stop()
        await asking
    assert engine.is_running(), "the engine was replaced"
    return windows


def test_work_leaves_a_server_as_it_was(tiny_artifact, is_soak, soak_folder, tmp_path):
    """Thirty minutes in soak, on the sample model if it is here; else a few seconds, in which speed says nothing."""
    model = artifact_of_sample(tmp_path) if is_soak else None
    count, seconds, num_clients = (30, 60.0, 6) if is_soak else (2, 1.0, 1)
    root, sources = tmp_path / "root", save_job_sources(tmp_path / "sources")
    arguments = [str(model or tiny_artifact), "--artifact-root", str(root), "--job-sources", str(sources)]
    arguments += ["--kv-cache-bytes", str(64 * MIB if model else 8 * MIB)]
    with running_server(*arguments, log_file=tmp_path / "log") as server:
        clients = Clients(server.url, "tiny" if model is None else "sample", num_clients)
        windows = asyncio.run(windows_of(server, clients, count, seconds, soak_folder / "endurance.csv"))
        metrics = LiveMetrics(server.url)
        for gauge in ("onebit_requests_running", "onebit_requests_waiting", "onebit_kv_cache_usage_ratio"):
            assert metrics.total(gauge) == 0, gauge
        assert [line for line in server.log() if line["level"] == "error"] == []
    middle, end = windows[count // 3 : 2 * count // 3], windows[2 * count // 3 :]  # of two: the first, the second
    for what in ("server_mib", "engine_mib"):
        assert typical(end, what) <= typical(middle, what) + GROWTH_MIB, [getattr(one, what) for one in windows]
    assert min(one.descriptors for one in end) <= min(one.descriptors for one in middle) + SPARE_DESCRIPTORS, windows
    if is_soak:
        middle, end = ([one for one in part if one.others < BUSY_ELSEWHERE] for part in (middle, end))
        assert min(len(middle), len(end)) >= QUIET_WINDOWS, "the machine did too much else to say how fast this was"
        assert typical(end, "p99_ms") <= SLOWER * typical(middle, "p99_ms"), [one.p99_ms for one in windows]


def artifact_of_sample(folder):
    """The sample model in signs, or None where it is not installed."""
    try:
        sample = sample_model_path()
    except ModelNotFound:
        return None
    config = QuantizeConfig(model=str(sample), method="svid", embedding_bits=8, name="sample")
    quantize_model(config, folder / "artifact")
    return folder / "artifact"


def typical(windows: list[Window], what: str) -> float:
    """The median of a figure."""
    return statistics.median(getattr(one, what) for one in windows)
