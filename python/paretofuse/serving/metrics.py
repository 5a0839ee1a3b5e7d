"""What Prometheus reads at /metrics; each app has a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The numbers of one app; methods may run in any thread.

    Args:
        model_bytes: of a merged model.
        merge_bytes: that a merge reads and writes.
    """

    def __init__(self, model_bytes: int, merge_bytes: int) -> None:
        self._registry = CollectorRegistry()
        self._merge_bytes = merge_bytes

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"paretofuse_{name}", text, labels, registry=self._registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"paretofuse_{name}", text, registry=self._registry)

        self.requests = counter("requests", "Requests by address and status.", "path", "status")
        self.refused = counter("refused", "Requests that found the queue full.")
        self.cancelled = counter("cancelled", "Requests whose client left.")
        self.tokens = counter("tokens", "Tokens generated.")
        self.reloads = counter("reloads", "Store versions taken up.")
        self.queue = gauge("queue_rows", "Rows that wait.")
        self.active = gauge("active_rows", "Rows in work.")
        self.replicas = gauge("replicas_merged", "Preferences that a replica holds.")
        gauge("model_bytes", "Bytes of a merged model.").set(model_bytes)
        self.latency = Histogram(
            "paretofuse_request_seconds", "From a request to its end, by whether its preference was merged already.",
            ("merged",), buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self.batch = Histogram(
            "paretofuse_batch_rows", "Rows of a forward pass: of one preference (merged) or several (mixed).",
            ("kind",), buckets=_ROWS, registry=self._registry,
        )  # fmt: skip
        self._merges = Histogram(
            "paretofuse_merge_seconds", "A merge, with the wait for its replica.", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._bandwidth = gauge(
            "merge_bytes_per_second", "Bytes read and written by the last merge, by its time."
        )

    def merged(self, seconds: float) -> None:
        """A merge was made."""
        self._merges.observe(seconds)
        self._bandwidth.set(self._merge_bytes / max(seconds, 1e-9))

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
