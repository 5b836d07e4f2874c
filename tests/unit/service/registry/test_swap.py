"""Swaps, aliases and what is remembered, over scripted engines."""

import asyncio
import json

import pytest

from onebit_core.errors import ArtifactError
from service.errors import BadRequest, Conflict, EngineStartFailed, ModelLoading, NotFound, UnknownModel
from service.metrics import Metrics
from service.registry.registry import ModelRegistry
from service.settings import Settings
from tests.support.paper_artifact import write_paper_artifact
from tests.support.scripted_engine import EngineStats, ScriptedStarter


class Gate:
    """Starts scripted engines, from the second on only when it is open, and fails those of one artifact."""

    def __init__(self) -> None:
        self.starter = ScriptedStarter()
        self.opened = asyncio.Event()
        self.broken = ""

    @property
    def engines(self):
        return self.starter.engines

    async def __call__(self, config):
        if self.engines:
            await self.opened.wait()
        if self.broken and config.artifact.endswith(self.broken):
            raise EngineStartFailed("it computes something else")
        return await self.starter(config)


@pytest.fixture
def root(tmp_path):
    """Two artifacts of one name."""
    for folder in ("blue", "green"):
        write_paper_artifact(tmp_path / "root" / folder)
    return tmp_path / "root"


def registry_of(gate, root, **settings):
    values = {"artifacts": [str(root / "blue")], "artifact_root": root, **settings}
    metrics = Metrics()
    return ModelRegistry(Settings(**values), metrics, gate), metrics


async def settle():
    for _ in range(200):
        await asyncio.sleep(0.001)


def told(story):
    asyncio.run(asyncio.wait_for(story(), 30))


def test_a_swap_serves_the_old_one_until_the_new_one_is_ready(root):
    """Who holds the old one keeps it; from the moment the new one is ready everybody gets that."""

    async def story():
        gate = Gate()
        registry, metrics = registry_of(gate, root)
        await registry.load_initial([str(root / "blue")])
        with registry.lease("paper") as old:
            swapping = asyncio.create_task(registry.swap("paper", root / "green"))
            await settle()
            assert [slot.state for slot in registry.slots()] == ["ready", "loading"]
            with registry.lease("paper") as still:
                assert still is old
            gate.opened.set()
            new = await swapping
            with registry.lease("paper") as now:
                assert now is new
            assert registry.models() == [new]
            old.engine.stats = EngineStats(num_running=2, num_waiting=1)
            new.engine.stats = EngineStats(num_running=3)
            registry.refresh_metrics()
            assert metrics.registry.get_sample_value("onebit_requests_running", {"model": "paper"}) == 5
            await settle()
            assert not old.engine.stopped
        await settle()
        assert old.engine.stopped
        assert [slot.state for slot in registry.slots()] == ["ready"]
        assert metrics.registry.get_sample_value("onebit_requests_running", {"model": "paper"}) is not None

    told(story)


def test_a_swap_that_fails_changes_nothing(root):
    """Not an artifact, or one whose engine does not start: the served one has not noticed."""

    async def story():
        gate = Gate()
        gate.opened.set()
        gate.broken = "green"
        registry, metrics = registry_of(gate, root)
        await registry.load_initial([str(root / "blue")])
        with pytest.raises(EngineStartFailed):
            await registry.swap("paper", root / "green")
        with pytest.raises(ArtifactError):
            await registry.swap("paper", root / "nothing")
        report = root / "green" / "report.json"
        report.write_text(report.read_text().replace("2026-01-01T00:00:00+00:00", "yesterday"))
        with pytest.raises(ArtifactError, match="yesterday"):
            await registry.swap("paper", root / "green")
        assert [slot.path.name for slot in registry.slots()] == ["blue"]
        assert not gate.engines[0].stopped
        assert metrics.registry.get_sample_value("onebit_artifact_parameters", {"model": "paper"}) == 1000

    told(story)


def test_one_change_of_a_name_at_a_time(root):
    """While it is swapped, a name is neither swapped again, nor unloaded, nor loaded; unknown names are not swapped."""

    async def story():
        gate = Gate()
        registry, _ = registry_of(gate, root)
        await registry.load_initial([str(root / "blue")])
        swapping = asyncio.create_task(registry.swap("paper", root / "green"))
        await settle()
        for change in (registry.swap("paper", root / "green"), registry.load(root / "green")):
            with pytest.raises(Conflict):
                await change
        with pytest.raises(Conflict, match="being swapped"):
            registry.unload("paper")
        gate.opened.set()
        await swapping
        with pytest.raises(UnknownModel, match="known: paper"):
            await registry.swap("other", root / "green")

    told(story)


def test_unloading_first_tells_requests_to_come_back(root):
    """The old engine ends before the new one starts; if that one fails, the old artifact is served again."""

    async def story():
        gate = Gate()
        registry, _ = registry_of(gate, root)
        await registry.load_initial([str(root / "blue")])
        swapping = asyncio.create_task(registry.swap("paper", root / "green", unload_first=True))
        await settle()
        assert gate.engines[0].stopped
        with pytest.raises(ModelLoading) as refused, registry.lease("paper"):
            pass
        assert refused.value.retry_after_seconds
        with pytest.raises(Conflict):
            await registry.swap("paper", root / "green")
        gate.opened.set()
        assert (await swapping).path.name == "green"
        gate.broken = "blue"
        with pytest.raises(EngineStartFailed):
            await registry.swap("paper", root / "blue", unload_first=True)
        assert registry.get("paper").path.name == "green"
        (root / "green" / "manifest.json").unlink()
        with pytest.raises(EngineStartFailed):
            await registry.swap("paper", root / "blue", unload_first=True)
        assert registry.slots() == []

    told(story)


def test_a_name_is_free_while_its_last_model_drains(root):
    """Unload and load at once: two engines for as long as an old request runs."""

    async def story():
        gate = Gate()
        gate.opened.set()
        registry, metrics = registry_of(gate, root)
        await registry.load(root / "blue")
        with registry.lease("paper") as old:
            registry.unload("paper")
            with pytest.raises(UnknownModel):
                registry.unload("paper")
            new = await registry.load(root / "green")
            assert [slot.state for slot in registry.slots()] == ["ready", "draining"]
        await settle()
        assert (old.engine.stopped, new.engine.stopped) == (True, False)
        assert metrics.registry.get_sample_value("onebit_artifact_parameters", {"model": "paper"}) == 1000
        registry.unload("paper")
        await settle()
        assert metrics.registry.get_sample_value("onebit_artifact_parameters", {"model": "paper"}) is None

    told(story)


def test_an_alias_is_another_name(root):
    """It is repointed between two requests, stays through swaps, and protects its model from being unloaded."""

    async def story():
        gate = Gate()
        gate.opened.set()
        registry, _ = registry_of(gate, root)
        blue, green = [await registry.load(root / name, name) for name in ("blue", "green")]
        registry.aliases.point("live", "blue")
        with registry.lease("live") as held:
            registry.aliases.point("live", "green")
            assert held is blue
            assert registry.get("live") is green
        for refused in (
            lambda: registry.unload("green"),
            lambda: registry.unload("live"),
            lambda: registry.aliases.point("blue", "green"),
        ):
            with pytest.raises(Conflict):
                refused()
        for call in (registry.load(root / "blue", "live"), registry.swap("live", root / "blue")):
            with pytest.raises(Conflict, match="alias"):
                await call
        with pytest.raises(UnknownModel, match="'live' is an alias of 'green'"):
            registry.aliases.point("second", "live")
        for odd in ("", "a b", "../x", "x" * 200):
            with pytest.raises(BadRequest):
                registry.aliases.point(odd, "blue")
        swapped = await registry.swap("green", root / "blue")
        assert registry.get("live") is swapped
        registry.aliases.remove("live")
        with pytest.raises(NotFound, match="known: none"):
            registry.aliases.remove("live")
        with pytest.raises(UnknownModel):
            registry.get("live")
        registry.unload("green")

    told(story)


def test_what_was_served_is_served_again(root):
    """Loaded models and aliases return after a restart; what is gone is told, and what is named at start wins."""

    async def story():
        first, _ = registry_of(Gate(), root)
        first._loader._start_engine.opened.set()
        await first.load_initial([str(root / "blue")])
        assert not (root / ".served.json").exists()  # all of it is named at start
        await first.load(root / "green", "second")
        await first.load(root / "green", "third")
        await first.swap("paper", root / "green")
        first.aliases.point("live", "second")
        first.unload("third")
        await first.stop()
        written = {"models": {"paper": "green", "second": "green"}, "aliases": {"live": "second"}}
        assert json.loads((root / ".served.json").read_text()) == written

        gate = Gate()
        gate.opened.set()
        again, _ = registry_of(gate, root)
        await again.load_initial([str(root / "blue")])
        assert again.is_ready
        assert {model.name: model.path.name for model in again.models()} == {"paper": "blue", "second": "green"}
        assert again.get("live").name == "second"
        await again.stop()

    told(story)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"models": {}}', '{"models": {"a": 1}, "aliases": {}}', '{"models": [], "aliases": {}}', "\x00"],
)
def test_a_damaged_record_is_no_reason_not_to_start(root, text):
    """It is told in the log; the models named at start are served."""
    (root / ".served.json").write_text(text)
    registry, _ = registry_of(ScriptedStarter(), root)
    asyncio.run(registry.load_initial([str(root / "blue")]))
    assert [model.name for model in registry.models()] == ["paper"]


def test_a_record_leads_nowhere_else(root, tmp_path):
    """A path outside of the root is refused, and kept, as whatever else could not be loaded this time."""
    outside = write_paper_artifact(tmp_path / "outside")
    models = {"a": str(outside), "b": "../outside", "c": "gone", "d": "green"}
    (root / ".served.json").write_text(json.dumps({"models": models, "aliases": {"x": "a", "y": "d"}}))
    registry, _ = registry_of(ScriptedStarter(), root)
    asyncio.run(registry.load_initial([]))
    assert [model.name for model in registry.models()] == ["d"]
    assert registry.aliases.targets() == {"y": "d"}
    kept = json.loads((root / ".served.json").read_text())["models"]
    assert kept == {"a": str(outside), "b": "../outside", "d": "green"}
