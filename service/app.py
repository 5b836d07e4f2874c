"""The whole wiring of the server, on one page.

settings -> metrics, keys, registry (engines), lifespan (jobs) -> FastAPI: routes, errors, middleware
"""

from fastapi import FastAPI

import onebit_core
from service.api import health
from service.api.admin import artifacts, jobs, models
from service.api.errors import install_error_handlers
from service.api.middleware import BodyLimit, RequestContext
from service.api.openai import embeddings, probes, routes, tokenization
from service.api.openai.answers import ChatCompletionChunk
from service.api.openapi import install_openapi
from service.audit import AuditLog
from service.auth import KeyRing
from service.engine.client import EngineClient
from service.lifespan import Lifespan
from service.metrics import Metrics
from service.rate_limits import RateLimits, Rates
from service.registry.loading import EngineStarter
from service.registry.registry import ModelRegistry
from service.settings import Settings


def create_app(settings: Settings, start_engine: EngineStarter = EngineClient.start) -> FastAPI:
    """Build the application; nothing runs before its lifespan starts.

    Args:
        settings: checked settings.
        start_engine: starts the engine of a model; tests pass a double.

    Raises:
        OSError: the key file cannot be read, or the audit file not be written.
        ValueError: it is not a key file.
    """
    metrics = Metrics(vllm_names=settings.vllm_metric_names)
    registry = ModelRegistry(settings, metrics, start_engine)
    lifespan = Lifespan(settings, registry)
    app = FastAPI(
        title="onebit",
        version=onebit_core.__version__,
        summary="Quantized language models behind OpenAI's API.",
        lifespan=lifespan.run,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.admin_port = settings.admin_port
    app.state.keys = KeyRing(settings.keys_file)
    app.state.rate_limits = rate_limits(settings, metrics)
    app.state.audit = AuditLog(settings.audit_file)
    app.state.registry = registry
    app.state.lifespan = lifespan
    app.state.jobs = lifespan.jobs
    openai = (routes.router, embeddings.router, tokenization.router, probes.router)
    for router in (health.router, *openai, models.router, artifacts.router, jobs.router):
        app.include_router(router)
    install_error_handlers(app)
    install_openapi(app, ChatCompletionChunk)
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(RequestContext, metrics=metrics.http)
    return app


def rate_limits(settings: Settings, metrics: Metrics) -> RateLimits:
    """The rates of keys, counted on /metrics."""
    return RateLimits(
        Rates(requests_per_minute=settings.requests_per_minute, tokens_per_minute=settings.tokens_per_minute),
        on_refused=lambda kind: metrics.http.rate_limited.labels(kind).inc(),
    )
