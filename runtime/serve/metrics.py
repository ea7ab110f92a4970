"""What a server measures, for Prometheus: `/metrics`. Every metric begins with `prebake_`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector

from ..engine.engine import EntryListener

REQUEST_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
ENTRY_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
PICTURES = (1, 2, 4, 8, 16)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.answers = Counter(
            "prebake_requests", "Answers by route and status", ["route", "status"], registry=registry
        )
        self.cancelled = Counter("prebake_cancelled", "Requests whose client went away", ["model"], registry=registry)
        self.request_seconds = Histogram(
            "prebake_request_seconds", "From a request's arrival to its last picture", ["model"],
            buckets=REQUEST_SECONDS, registry=registry,
        )  # fmt: skip
        self.predicted_seconds = Histogram(
            "prebake_request_predicted_seconds", "What was predicted when it came, the queue before it included", ["model"],
            buckets=REQUEST_SECONDS, registry=registry,
        )  # fmt: skip
        self._entry_seconds = Histogram(
            "prebake_entry_seconds", "One call of a graph", ["model", "graph"], buckets=ENTRY_SECONDS, registry=registry
        )
        self._entry_predicted = Counter(
            "prebake_entry_predicted_seconds", "What was predicted of those calls, in all", ["model", "graph"],
            registry=registry,
        )  # fmt: skip
        self._entry_pictures = Histogram(
            "prebake_entry_pictures", "Pictures that shared a call", ["model"], buckets=PICTURES, registry=registry
        )
        self._gauges = {
            name: Gauge(f"prebake_{name}", text, ["model"], registry=registry)
            for name, text in (
                ("running", "Requests that were opened"),
                ("waiting", "Requests that wait unopened"),
                ("queue_seconds", "Predicted seconds until the queue is empty"),
                ("held_bytes", "What opened requests hold between evaluations"),
            )
        }
        self._artifact = Info("prebake_artifact", "The artifact that is served", ["model"], registry=registry)

    def entry_listener(self, model: str) -> EntryListener:
        """What an engine tells of its entries."""

        def told(graph: str, batch: int, predicted: float, seconds: float) -> None:
            self._entry_seconds.labels(model, graph).observe(seconds)
            self._entry_predicted.labels(model, graph).inc(predicted)
            self._entry_pictures.labels(model).observe(batch)

        return told

    def watch(self, model: str, values: dict[str, Callable[[], float]], facts: dict[str, str]) -> None:
        """Has gauges read whenever somebody asks, those of the version that is served now; `facts` describe its artifact."""
        for name, value in values.items():
            self._gauges[name].labels(model).set_function(value)
        self._artifact.labels(model).info(facts)
