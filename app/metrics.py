"""`/httptrading/metrics` for Prometheus; off unless configured, and on its own token."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from typing import Any

from flask import Response

from httptrading.brokers.base import masked
from httptrading.brokers.gateway import Gateway
from httptrading.errors import HttpTradingError


class Metrics:
    """Counts requests; reads everything else from the gateway when asked."""

    def __init__(self, gateway: Gateway) -> None:
        import prometheus_client as prometheus
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        self._prometheus = prometheus
        self._counter = CounterMetricFamily
        self._gauge = GaugeMetricFamily
        self._gateway = gateway
        self._registry = prometheus.CollectorRegistry()
        self._requests = prometheus.Counter(
            "httptrading_requests",
            "Requests by route and outcome (OK or the error code)",
            ("route", "outcome"),
            registry=self._registry,
        )
        self._seconds = prometheus.Histogram(
            "httptrading_request_seconds",
            "Time from a request's arrival to its answer",
            ("route",),
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
            registry=self._registry,
        )
        self._registry.register(self)

    def observe(self, route: str, outcome: str, seconds: float) -> None:
        self._requests.labels(route, outcome).inc()
        self._seconds.labels(route).observe(seconds)

    def admits(self, authorization: str, token: str) -> bool:
        """`Authorization: Bearer <metrics_token>`."""
        return hmac.compare_digest(authorization.encode(), f"Bearer {token}".encode())

    def page(self) -> Response:
        text = self._prometheus.generate_latest(self._registry)
        return Response(text, 200, content_type=self._prometheus.CONTENT_TYPE_LATEST)

    def collect(self) -> Iterator[Any]:
        """The gateway's own figures, read at this moment."""
        labels = ("instance", "connection")
        connected = self._gauge("httptrading_connected", "1 while connected", labels=labels)
        queued = self._gauge("httptrading_queue_depth", "Calls that wait", labels=labels)
        reconnects = self._counter("httptrading_reconnects", "Lost connections", labels=labels)
        replaced = self._counter(
            "httptrading_worker_replacements", "Stuck workers given up", labels=labels
        )
        memory = self._gauge(
            "httptrading_child_memory_bytes", "Resident memory of a child process", labels=labels
        )
        left = self._gauge(
            "httptrading_window_slots_left",
            "Calls left in a rate window",
            labels=("instance", "window"),
        )
        unknown = self._gauge(
            "httptrading_unsettled_orders", "Orders with an unknown outcome", labels=("instance",)
        )
        age = self._gauge(
            "httptrading_oldest_unsettled_seconds",
            "Age of the oldest of them",
            labels=("instance",),
        )
        for instance in self._gateway.instances().values():
            name = _label(instance.id)
            for connection in instance.connections():
                at = (name, connection.name)
                connected.add_metric(at, float(connection.state.connected))
                queued.add_metric(at, connection.queued)
                reconnects.add_metric(at, connection.state.reconnects)
                replaced.add_metric(at, connection.state.replacements)
                if connection.child_memory is not None:
                    memory.add_metric(at, connection.child_memory)
            for window, slots in instance.windows.state().items():
                left.add_metric((name, window), slots.left)
            try:
                state = instance.state()
            except HttpTradingError:  # the journal cannot be read: rather no figure than a 0
                continue
            unknown.add_metric((name,), state.unsettled)
            age.add_metric((name,), state.unsettled_seconds)
        yield from (connected, queued, reconnects, replaced, memory, left, unknown, age)


def _label(instance_id: str) -> str:
    """Masked as in the logs, and unlike that of another instance that begins the same."""
    return f"{masked(instance_id)}{hashlib.sha256(instance_id.encode()).hexdigest()[:6]}"
