"""The registry: names, leases, loading and unloading, over scripted engines."""

import asyncio
from contextlib import ExitStack

import pytest

from onebit_core.errors import ArtifactError, CorruptArtifact
from service.errors import BadRequest, Conflict, EngineStartFailed, ModelLoading, NotFound, ShuttingDown, UnknownModel
from service.metrics import Metrics
from service.registry.registry import ModelRegistry
from service.registry.shelf import resolve_artifact
from service.settings import Settings
from tests.support.paper_artifact import write_paper_artifact
from tests.support.scripted_engine import EngineStats, ScriptedStarter


@pytest.fixture
def artifact(tmp_path):
    return write_paper_artifact(tmp_path / "paper")


def registry_of(starter=None, **settings):
    return ModelRegistry(Settings(artifacts=["x"], **settings), Metrics(), starter or ScriptedStarter())


def test_a_model_is_served_under_its_name(artifact):
    """The manifest's name by default, another if asked, both with engines of the configured kind."""

    async def story():
        starter = ScriptedStarter()
        registry = registry_of(starter, page_size=8, dtype="bfloat16")
        await registry.load_initial([str(artifact)])
        await registry.load(artifact, "other")
        assert [model.name for model in registry.models()] == ["paper", "other"]
        assert registry.is_ready
        config = starter.engines[0].config
        assert (config.artifact, config.page_size, config.dtype) == (str(artifact), 8, "bfloat16")

    asyncio.run(story())


def test_unloading_waits_for_the_last_lease(artifact):
    """The name is gone at once, the engine when nobody uses it any more; then the name is free again."""

    async def story():
        starter = ScriptedStarter()
        registry = registry_of(starter)
        await registry.load(artifact)
        with ExitStack() as requests:
            registry.get("paper")  # a lease that was returned before
            requests.enter_context(registry.lease("paper"))
            requests.enter_context(registry.lease("paper"))
            registry.unload("paper")
            with pytest.raises(UnknownModel), registry.lease("paper"):
                pass
            await asyncio.sleep(0.01)
            assert not starter.engines[0].stopped
        await asyncio.sleep(0.01)
        assert starter.engines[0].stopped
        assert registry.slots() == []
        await registry.load(artifact)
        with registry.lease("paper") as model:
            assert model.engine is starter.engines[1]

    asyncio.run(story())


def test_a_name_is_loaded_once(artifact):
    """A second load of a name conflicts, even while the first is under way."""

    async def story():
        registry = registry_of()
        results = await asyncio.gather(registry.load(artifact), registry.load(artifact), return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["Conflict", "ServedModel"]
        with pytest.raises(Conflict):
            await registry.load(artifact)

    asyncio.run(story())


def test_a_failed_load_leaves_nothing(artifact):
    """An engine that does not start gives its name back."""

    async def story():
        starter = ScriptedStarter(refusal=EngineStartFailed("no memory"))
        registry = registry_of(starter)
        with pytest.raises(EngineStartFailed):
            await registry.load(artifact)
        assert registry.slots() == []
        starter.refusal = None
        await registry.load(artifact)

    asyncio.run(story())


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "x"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("report.json", "{"),
    ],
)
def test_a_damaged_file_is_an_artifact_error(artifact, file, text):
    """Whatever a damaged file makes a library raise, the answer names the artifact, and the name is free again."""
    (artifact / file).write_text(text)
    starter = ScriptedStarter()
    registry = registry_of(starter)
    with pytest.raises(ArtifactError, match="paper"):
        asyncio.run(registry.load(artifact))
    assert registry.slots() == []
    assert all(engine.stopped for engine in starter.engines)  # it is started while the tokenizer is read


def test_a_report_that_cannot_be_shown_is_a_corrupt_artifact(artifact):
    """A date that is none, found when its metric is set, fails the load before an engine is started."""
    report = (artifact / "report.json").read_text()
    (artifact / "report.json").write_text(report.replace("2026-01-01T00:00:00+00:00", "yesterday"))
    starter = ScriptedStarter()
    registry = registry_of(starter)
    with pytest.raises(CorruptArtifact, match="yesterday"):
        asyncio.run(registry.load(artifact))
    assert (registry.slots(), starter.engines) == ([], [])


def test_while_a_model_loads_requests_are_told_to_wait(artifact):
    """Between the start and the engine's first sign the answer is 503, come back."""

    async def story():
        gate = asyncio.Event()

        async def slow(config):
            await gate.wait()
            return await ScriptedStarter()(config)

        registry = registry_of(slow)
        loading = asyncio.create_task(registry.load_initial([str(artifact)]))
        while not registry.slots():
            await asyncio.sleep(0.01)
        with pytest.raises(ModelLoading) as refused, registry.lease("paper"):
            pass
        assert refused.value.retry_after_seconds
        with pytest.raises(Conflict):
            registry.unload("paper")
        assert not registry.is_ready
        gate.set()
        await loading
        assert registry.is_ready

    asyncio.run(story())


def test_a_dead_engine_makes_the_server_unready(artifact):
    """Readiness follows every engine, and a draining server is not ready."""

    async def story():
        starter = ScriptedStarter()
        registry = registry_of(starter)
        await registry.load_initial([str(artifact)])
        starter.engines[0].is_alive = False
        assert not registry.is_ready
        starter.engines[0].is_alive = True
        registry.close()
        assert not registry.is_ready
        with pytest.raises(ShuttingDown), registry.lease("paper"):
            pass
        await registry.stop()
        assert starter.engines[0].stopped

    asyncio.run(story())


@pytest.mark.parametrize("name", [" ", "a b", "../x", "é", "x" * 200, "a\n"])
def test_odd_names_are_refused(artifact, name):
    """A name goes into labels, logs and paths of the API, so it is plain."""
    with pytest.raises(BadRequest):
        asyncio.run(registry_of().load(artifact, name))


def test_what_is_not_an_artifact_is_refused(tmp_path):
    """A missing or empty folder is an ArtifactError before any engine starts."""
    with pytest.raises(ArtifactError):
        asyncio.run(registry_of().load(tmp_path / "nothing"))


def test_admins_load_only_from_the_artifact_root(tmp_path):
    """Relative or absolute, links resolved: inside the root, or named at start."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    inside = root / "model"
    for folder in (inside, elsewhere, tmp_path / "named"):
        folder.mkdir(parents=True)
    (root / "link").symlink_to(elsewhere)
    settings = Settings(artifact_root=root, artifacts=[str(tmp_path / "named")])
    assert resolve_artifact(settings, "model") == inside
    assert resolve_artifact(settings, str(inside)) == inside
    assert resolve_artifact(settings, str(tmp_path / "named")) == tmp_path / "named"
    for path in ("link", "../elsewhere", str(elsewhere), "/etc", ".", "a\x00b", "x" * 300, "http://x/y/../../../.."):
        with pytest.raises(BadRequest):
            resolve_artifact(settings, path)
    with pytest.raises(NotFound):
        resolve_artifact(settings, "missing")


def test_steps_and_restarts_are_counted_once(artifact):
    """Counters follow the engine's own, which only grow; iterations are observed one by one."""

    async def story():
        starter = ScriptedStarter()
        metrics = Metrics()
        registry = ModelRegistry(Settings(artifacts=["x"]), metrics, starter)
        await registry.load(artifact)
        engine = starter.engines[0]
        engine.stats = EngineStats(num_running=2, num_waiting=1, kv_cache_usage=0.5, num_steps=1, iteration_tokens=7)
        engine.on_stats(engine.stats)
        engine.on_stats(EngineStats(num_steps=2, iteration_tokens=3, num_preemptions=4))
        engine.on_stats(EngineStats(num_steps=2, iteration_tokens=3, num_preemptions=4))
        engine.restarts = 2
        registry.refresh_metrics()
        registry.refresh_metrics()

        def value(name):
            return metrics.registry.get_sample_value(name, {"model": "paper"})

        assert value("onebit_requests_running") == 2
        assert value("onebit_requests_waiting") == 1
        assert value("onebit_kv_cache_usage_ratio") == 0.5
        assert (value("onebit_iteration_tokens_count"), value("onebit_iteration_tokens_sum")) == (2, 10)
        assert value("onebit_preemptions_total") == 4
        assert value("onebit_engine_restarts_total") == 2
        cache = {
            "page_size": "16",
            "num_pages": "64",
            "dtype": "float32",
            "max_model_len": "64",
            "prefix_caching": "True",
        }
        assert metrics.registry.get_sample_value("onebit_cache_config_info", {"model": "paper", **cache}) == 1

    asyncio.run(story())


def test_loading_and_unloading_later_leaves_the_server_ready(artifact, tmp_path):
    """A model that comes or goes while the server runs is no reason to take it out of service."""

    async def story():
        gate = asyncio.Event()
        starter = ScriptedStarter()

        async def start(config):
            if starter.engines:
                await gate.wait()
            return await starter(config)

        registry = registry_of(start)
        await registry.load_initial([str(artifact)])
        loading = asyncio.create_task(registry.load(artifact, "second"))
        while len(registry.slots()) < 2:
            await asyncio.sleep(0.01)
        assert registry.is_ready
        gate.set()
        await loading
        with registry.lease("second") as model:
            registry.unload("second")
            model.engine.is_alive = False
            assert registry.is_ready
        await asyncio.sleep(0.01)
        assert registry.is_ready

    asyncio.run(story())
