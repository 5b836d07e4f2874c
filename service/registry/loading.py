"""From an artifact to a model that answers: engine and tokenizer, golden prompts, and only then its series on /metrics.

Nothing of a model is shown or counted before it is certain that it will be served, because in a swap another of the
same name is being served meanwhile.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from onebit_core.artifact.golden import read_golden
from onebit_core.artifact.manifest import Manifest
from onebit_core.errors import CorruptArtifact
from service.accuracy.scorer import LiveScorer
from service.accuracy.types import ScorerConfig
from service.engine.client import EngineClient
from service.engine.types import ARTIFACT_LOADER, ORIGINAL_LOADER, EngineConfig
from service.metrics import ArtifactMetrics, Metrics
from service.registry.adapters import Adapter, adapters_of
from service.registry.artifacts import Identity, check_tokenizer_size, read_tokenizer
from service.registry.golden import GoldenResult, replay_golden
from service.registry.served import ServedModel
from service.registry.watch import StatsCounter
from service.settings import Settings

logger = logging.getLogger(__name__)

EngineStarter = Callable[[EngineConfig], Awaitable[EngineClient]]


class ModelLoader:
    """Makes served models."""

    def __init__(self, settings: Settings, metrics: Metrics, start_engine: EngineStarter) -> None:
        self._settings = settings
        self._metrics = metrics
        self._start_engine = start_engine

    async def load(self, name: str, path: Path, identity: Identity) -> ServedModel:
        """Start engine and tokenizer, and let the engine pass its golden prompts.

        Raises:
            CorruptArtifact: a file of the artifact is damaged.
            EngineStartFailed: the engine could not load it, or computes something else than the reference.
        """
        _check_report(name, path, identity)
        await asyncio.to_thread(check_tokenizer_size, identity.folder)
        adapters = await asyncio.to_thread(adapters_of, self._settings.adapter, identity.manifest)
        engine, tokenizer = await self._start(identity, adapters)
        golden = None if identity.is_original else await self._check_golden(name, path, identity.manifest, engine)
        return ServedModel(
            name=name,
            path=path,
            manifest=identity.manifest,
            report=identity.report,
            tokenizer=tokenizer,
            engine=engine,
            metrics=self._metrics.engine,
            adapters=tuple(adapter.name for adapter in adapters),
            golden=golden,
        )

    def publish(self, model: ServedModel) -> None:
        """Show a model's series, in place of those of an earlier one of its name, and let it be scored."""
        self.withdraw(model.name)
        settings, metrics, engine, info = self._settings, self._metrics, model.engine, model.engine.info
        metrics.engine.start_series(model.name)
        metrics.artifact.start_series(model.name, model.manifest, model.report)
        if model.golden is not None:
            metrics.live.golden_error.labels(model.name).set(model.golden.error)
            metrics.live.golden_timestamp.labels(model.name).set(model.golden.timestamp)
        engine.on_stats = StatsCounter(metrics.engine, model.name, engine.stats)
        metrics.engine.info.labels(model.name, info.backend, info.device, info.dtype).set(1)
        dtype = info.dtype if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype
        cache = (settings.page_size, info.num_pages, dtype, info.max_model_len, settings.prefix_caching)
        metrics.engine.cache_info.labels(model.name, *map(str, cache)).set(1)
        model.scorer = self._scorer(model)
        logger.info("model loaded", extra={"model": model.name, "device": info.device, "backend": info.backend})

    def withdraw(self, name: str) -> None:
        """Take the series of a name away."""
        self._metrics.engine.end_series(name)
        self._metrics.artifact.end_series(name)
        self._metrics.live.end_series(name)

    async def _start(self, identity: Identity, adapters: Sequence[Adapter]) -> tuple[EngineClient, Any]:
        """Start the engine and read the tokenizer meanwhile; both import large packages first, each for itself."""
        starting = asyncio.ensure_future(self._start_engine(engine_config(self._settings, identity, adapters)))
        try:
            tokenizer = await asyncio.to_thread(read_tokenizer, identity.folder)
        except BaseException:
            starting.cancel()
            for engine in await asyncio.gather(starting, return_exceptions=True):
                if not isinstance(engine, BaseException):
                    await engine.stop()
            raise
        return await starting, tokenizer

    async def _check_golden(
        self, name: str, path: Path, manifest: Manifest, engine: EngineClient
    ) -> GoldenResult | None:
        """Replay the artifact's golden prompts; the engine is stopped if it fails them.

        Raises:
            EngineStartFailed: it computes something else than the reference.
            CorruptArtifact: the prompts are not those that were written.
        """
        if self._settings.golden_check == "off":
            return None
        try:
            golden = await asyncio.to_thread(read_golden, path, manifest)
            result = await replay_golden(engine, golden) if golden is not None else None
        except BaseException:
            await engine.stop()
            raise
        if result is None:
            why = "the artifact has none" if golden is None else "max_model_len leaves no room for them"
            logger.warning("served without a check of golden prompts: %s", why, extra={"model": name})
            return None
        checked = {"model": name, "logprob_error": round(result.error, 5), "tokens": result.tokens}
        logger.info("golden prompts agree", extra=checked)
        return result

    def _scorer(self, model: ServedModel) -> LiveScorer | None:
        """Make the scorer of a model, where one is asked for and there is an original to compare with."""
        settings = self._settings
        if not settings.score_share or model.is_original:
            return None
        original, source = settings.originals.get(model.name), model.manifest.source.model
        if original is None and not Path(source).expanduser().exists():
            reason = f"its original {source} is not on this machine; name one with --score-original"
            logger.warning("no live accuracy: %s", reason, extra={"model": model.name})
            return None
        config = ScorerConfig(
            artifact=str(model.path),
            original=original,
            device=settings.score_device,
            num_threads=settings.score_threads,
            max_tokens=settings.score_max_tokens,
            log_level=settings.log_level,
        )
        return LiveScorer(config, share=settings.score_share, metrics=self._metrics.live, model=model.name)


def _check_report(name: str, path: Path, identity: Identity) -> None:
    """Show what was measured to nobody, which finds what could not be shown.

    Raises:
        CorruptArtifact: the report has a date or an error that cannot be one.
    """
    try:
        ArtifactMetrics(CollectorRegistry()).start_series(name, identity.manifest, identity.report)
    except ValueError as error:
        raise CorruptArtifact(f"{path}: its report cannot be shown: {error}") from None


def engine_config(settings: Settings, identity: Identity, adapters: Sequence[Adapter] = ()) -> EngineConfig:
    """Say how the engine of a model is to run."""
    return EngineConfig(
        artifact=str(identity.folder),
        fingerprint=identity.fingerprint,
        loader=ORIGINAL_LOADER if identity.is_original else ARTIFACT_LOADER,
        device=settings.device,
        dtype=settings.dtype,
        backend=settings.backend,
        page_size=settings.page_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        kv_cache_dtype=settings.kv_cache_dtype,
        fuse=settings.fuse,
        decode_graphs=settings.decode_graphs,
        max_num_sequences=settings.max_num_sequences,
        max_batched_tokens=settings.max_batched_tokens,
        prefix_caching=settings.prefix_caching,
        max_queued_requests=settings.max_queued_requests,
        max_model_len=settings.max_model_len,
        adapters=tuple((adapter.name, str(adapter.folder), adapter.info.sha256) for adapter in adapters),
        log_level=settings.log_level,
    )
