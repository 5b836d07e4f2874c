"""Prometheus metrics of the HTTP side: requests, connections, limits. `service.metrics` shows them with all others."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

HTTP_SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
END_REASONS = ("receive_deadline", "send_stalled", "crowded_out", "refused", "malformed")
LIMIT_KINDS = ("requests", "tokens")


class HttpMetrics:
    """Requests by route template; paths without a route share one label. Connections by why the server ended them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "onebit_http_requests_total",
            "HTTP requests answered.",
            ["route", "method", "status"],
            registry=registry,
        )
        self.duration = Histogram(
            "onebit_http_request_duration_seconds",
            "From the request's head to the end of its answer.",
            ["route", "method"],
            buckets=HTTP_SECONDS_BUCKETS,
            registry=registry,
        )
        self.connections = Gauge("onebit_http_connections", "Open connections of clients.", registry=registry)
        self.connections_ended = Counter(
            "onebit_http_connections_ended_total",
            "Connections that the server ended for a reason of its own.",
            ["reason"],
            registry=registry,
        )
        self.rate_limited = Counter(
            "onebit_rate_limited_total",
            "Requests refused because a key was over its rate.",
            ["limit"],
            registry=registry,
        )
        for reason in END_REASONS:
            self.connections_ended.labels(reason)
        for limit in LIMIT_KINDS:
            self.rate_limited.labels(limit)
