"""Reads /metrics of a running server, as Prometheus would."""

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


class LiveMetrics:
    """The samples of one server, fetched anew at every question."""

    def __init__(self, url: str) -> None:
        self.url = url + "/metrics"

    def total(self, name: str, **labels: str) -> float:
        """Sum the samples of a name whose labels are these; fails if there are none."""
        with urllib.request.urlopen(self.url, timeout=30) as answer:
            page = answer.read().decode()
        found = [
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, f"/metrics has no sample {name} with {labels}"
        return sum(found)
