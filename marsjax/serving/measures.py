"""What the service tells Prometheus of itself. Needs the extra `serve`."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from marsjax.serving.engine import Answer
from marsjax.serving.people import Known

SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.025, 0.05, 0.1, 0.25, 1.0)
AGES = (1, 5, 15, 30, 60, 120, 300, 1200, 3600, 86400)
STAGES = ("lookup", "queue", "lend", "score", "total")
ROUTES = ("/v1/score", "/v1/augment", "/v1/events", "/healthz", "/readyz", "/metrics", "/explain", "/openapi.json")


class Measures:
    """One set of series for one service."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("marsjax_requests", "Answers.", ("route", "status"), registry=registry)
        self.stages = Histogram(
            "marsjax_stage_seconds", f"Time by stage: {', '.join(STAGES)}.", ("stage",), registry=registry,
            buckets=SECONDS,
        )  # fmt: skip
        self.seconds = {stage: self.stages.labels(stage) for stage in STAGES}
        self.fallbacks = Counter(
            "marsjax_fallbacks",
            "Scores without what MARS would lend: store, unknown_user, no_vector, empty_index, late; and unseen_item.",
            ("reason",), registry=registry,
        )  # fmt: skip
        self.cold = Counter("marsjax_cold_users", "Requests for users without a history.", registry=registry)
        self.borrowed = Histogram(
            "marsjax_borrowed_items", "Borrowed items in the history.", registry=registry,
            buckets=(0, 1, 5, 10, 25, 50, 100, 200),
        )  # fmt: skip
        self.vector_age = Histogram(
            "marsjax_vector_age_seconds", "Age of the user's vector in the store.", registry=registry, buckets=AGES
        )
        self.stale = Counter("marsjax_stale_vectors", "Vectors made from another history.", registry=registry)
        self.store_failures = Counter("marsjax_store_failures", "The store gave no answer in time.", registry=registry)
        self.events = Counter("marsjax_events_accepted", "Events added to the stream.", registry=registry)
        self.refused = Counter("marsjax_refused", "Requests refused since too much was waiting.", registry=registry)
        self.swaps = Counter("marsjax_swaps", "Other versions: done or refused.", ("result",), registry=registry)
        self.backlog = Gauge("marsjax_backlog", "Events that the runner is not done with.", registry=registry)
        self.dead = Gauge("marsjax_dead_letters", "Messages that nothing could be made of.", registry=registry)
        self.compiled = Gauge("marsjax_compilations_while_serving", "Must stay 0.", registry=registry)
        self.model_age = Gauge(
            "marsjax_model_age_seconds", "Since the bundle that answers was published.", registry=registry
        )

    def answered(self, path: str, status: int) -> None:
        """Counts an answer; paths that are none of ours are one series."""
        self.requests.labels(path if path in ROUTES else "other", str(status)).inc()

    def scored(self, answer: Answer, known: Known, unseen: list[int], seconds: float) -> None:
        """Counts what a request went through."""
        for stage, value in (*answer.seconds.items(), ("total", seconds)):
            self.seconds[stage].observe(value)
        reason = "late" if answer.late else known.fallback
        for name in ([reason] if reason else []) + (["unseen_item"] if unseen else []):
            self.fallbacks.labels(name).inc()
        if known.cold:
            self.cold.inc()
        if known.vector is not None:
            self.vector_age.observe(max(time.time() - known.vector.made, 0.0))
            if known.stale:
                self.stale.inc()
        self.borrowed.observe(answer.borrowed)
