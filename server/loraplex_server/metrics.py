"""Prometheus metrics of the front process; docs/operations.md lists them for operators.

Every series lives in the `CollectorRegistry` that is passed in. An adapter's name is a label on
counters and gauges only, never on histograms; only registered names become labels, at most
`adapter_labels` of them, and the rest share `_other`. A deleted adapter takes its series with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Thread
from typing import Final
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    start_http_server,
)

from loraplex_server.engine.messages import Hello, LoadDone, MergeDone, ModelInfo, StepDone

BASE_LABEL: Final = "_base"
OTHER_LABEL: Final = "_other"

_LONG: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
"""Seconds: time to first token, request duration, waiting."""
_SHORT: Final = (
    0.001,
    0.0025,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.025,
    0.05,
    0.075,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
)
"""Seconds: between tokens, engine steps."""
_ROWS: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

STATES: Final = ("host", "loading", "resident", "draining", "pinned", "merged")
"""Of adapters in the engine; a resident one can be pinned and merged too."""


class AdapterLabels:
    """Which adapter names may be labels: the first `limit` registered ones that see traffic."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._registered: set[str] = set()
        self._labels: set[str] = set()

    def __len__(self) -> int:
        return len(self._registered)

    def add(self, name: str) -> None:
        """The name is registered. Idempotent."""
        self._registered.add(name)

    def label(self, name: str) -> str:
        """The label that a name's numbers go under; "" is the base model."""
        if not name:
            return BASE_LABEL
        if name in self._labels:
            return name
        if name not in self._registered or len(self._labels) >= self._limit:
            return OTHER_LABEL
        self._labels.add(name)
        return name

    def remove(self, name: str) -> bool:
        """The name is registered no more; True if it was a label."""
        self._registered.discard(name)
        if name not in self._labels:
            return False
        self._labels.remove(name)
        return True


class Metrics:
    """All series, and the engine's observer: what the engine reports becomes numbers here."""

    def __init__(
        self, registry: CollectorRegistry, version: str = "", adapter_labels: int = 200
    ) -> None:
        self.registry = registry
        self._labels = AdapterLabels(adapter_labels)
        self._since_start: dict[Counter, int] = {}
        self._prefix_blocks = 0

        def counter(name: str, what: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"loraplex_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"loraplex_{name}", what, labels, registry=registry)

        def histogram(
            name: str, what: str, buckets: Sequence[float], labels: Sequence[str] = ()
        ) -> Histogram:
            return Histogram(f"loraplex_{name}", what, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "RPCs ended.", ("method", "code"))
        self.rejected = counter("rejected_requests", "Requests refused or failed.", ("reason",))
        self.queue_depth = gauge("queue_depth", "Requests whose prompt is not computed yet.")
        self.queued_tokens = gauge("queued_tokens", "Prompt tokens of those requests.")
        self.running = gauge("running_requests", "Requests that are producing tokens.")
        self.queue_wait = histogram(
            "queue_wait_seconds", "From submission to the first scheduled step.", _LONG
        )
        self.first_token = histogram(
            "time_to_first_token_seconds", "From the RPC's arrival to its first token.", _LONG
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds",
            "Between the tokens of one request; the mean over those that were sent together.",
            _SHORT,
        )
        self.duration = histogram(
            "request_duration_seconds", "From an RPC's arrival to its end.", _LONG, ("method",)
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of started requests.")
        self.generated_tokens = counter("generated_tokens", "Tokens returned to clients.")
        self.batch_rows = histogram(
            "batch_rows",
            "Rows of a step: decode rows, of the bare base, of merged adapters.",
            _ROWS,
            ("kind",),
        )
        self.prefill_tokens = counter("prefill_tokens", "Prompt tokens computed, repeats included.")
        self.distinct_adapters = histogram(
            "batch_distinct_adapters", "Different adapters in a step.", _ROWS
        )
        self.step_seconds = histogram("engine_step_seconds", "Duration of an engine step.", _SHORT)
        self.kv_blocks = gauge("kv_blocks", "KV cache blocks.", ("state",))
        self.preemptions = counter("preemptions", "Requests put back for lack of KV blocks.")
        self.adapter_requests = counter(
            "adapter_requests", "Generations ended, by adapter.", ("adapter", "code")
        )
        self.adapter_tokens = counter("adapter_tokens", "Tokens by adapter.", ("adapter", "kind"))
        self.adapter_active = gauge(
            "adapter_active_requests", "Generations that run or wait, by adapter.", ("adapter",)
        )
        self.adapter_last_use = gauge(
            "adapter_last_use_timestamp_seconds",
            "Unix time at which an adapter's last generation ended.",
            ("adapter",),
        )
        self.adapter_loads = counter(
            "adapter_loads", "Loads onto the device, by where from.", ("tier", "result")
        )
        self.adapter_load_seconds = histogram(
            "adapter_load_seconds",
            "Bringing one adapter to the device: from disk with reading, checking and packing.",
            _LONG,
            ("tier",),
        )
        self.unloads = counter("adapter_unloads", "Unloads that were ordered.", ("result",))
        self.evictions = counter(
            "adapter_evictions", "Adapters pushed out for others, by where from.", ("tier",)
        )
        self.prefetches = counter(
            "adapter_prefetches", "Adapters read into host memory ahead of their turn."
        )
        self.prefetch_hits = counter("adapter_prefetch_hits", "Prefetched adapters that were used.")
        self.merges = counter(
            "adapter_merges", "Merges and unmerges.", ("change", "cause", "result")
        )
        self.merge_seconds = histogram(
            "adapter_merge_seconds", "Computing the dense copies of one adapter.", _LONG
        )
        self.merge_step_seconds = gauge(
            "adapter_merge_step_seconds",
            "Step time unmerged and merged, as the last automatic decision measured it.",
            ("weights",),
        )
        self.adapters = gauge("adapters", "Adapters by state.", ("state",))
        self.adapter_bytes = gauge("adapter_bytes", "Bytes that adapters take.", ("tier",))
        self.adapter_budget_bytes = gauge(
            "adapter_budget_bytes", "Bytes that adapters may take.", ("tier",)
        )
        self.prefix_blocks = gauge(
            "adapter_prefix_blocks", "KV blocks set aside for virtual tokens.", ("state",)
        )
        self.training = gauge("training_jobs", "Training jobs by state.", ("state",))
        self.training_ends = counter(
            "training_jobs_ended", "Training jobs that ended, by how.", ("result",)
        )
        self.training_tokens = counter(
            "training_tokens", "Tokens that ended training jobs were trained on."
        )
        self.engine_ready = gauge("engine_ready", "1 while the engine takes requests.")
        self.engine_restarts = counter("engine_restarts", "Times the engine was started again.")
        self.build_info = gauge("build_info", "Constant 1.", ("version",))
        self.model_info = gauge(
            "model_info",
            "Constant 1.",
            ("model", "architecture", "dtype", "device", "kernels", "fingerprint"),
        )
        self.build_info.labels(version).set(1)
        self._decode_rows = self.batch_rows.labels("decode")
        self._base_rows = self.batch_rows.labels("base")
        self._merged_rows = self.batch_rows.labels("merged")
        self._free_blocks = self.kv_blocks.labels("free")
        self._used_blocks = self.kv_blocks.labels("used")
        self._device_evictions = self.evictions.labels("device")
        self._host_evictions = self.evictions.labels("host")
        self._registered = self.adapters.labels("registered")
        for tier in ("device", "host", "merged"):
            self.adapter_bytes.labels(tier)
            self.adapter_budget_bytes.labels(tier)
        for result in ("ok", "error"):
            self.unloads.labels(result)
            for tier in ("disk", "host"):
                self.adapter_loads.labels(tier, result)
                self.adapter_load_seconds.labels(tier)
            for change in ("merge", "unmerge"):
                for cause in ("order", "automatic"):
                    self.merges.labels(change, cause, result)
        for weights in ("unmerged", "merged"):
            self.merge_step_seconds.labels(weights)
        for result in ("succeeded", "failed", "cancelled"):
            self.training_ends.labels(result)
        self.training_jobs(0, 0)
        for label in (BASE_LABEL, OTHER_LABEL):
            self.adapter_tokens.labels(label, "prompt")
            self.adapter_tokens.labels(label, "completion")
            self.adapter_active.labels(label)
            self.adapter_last_use.labels(label)
        self._holds_nothing()

    # the engine's observer

    def on_ready(self, hello: Hello) -> None:
        """The engine is up: its model, its blocks, its budget."""
        model: ModelInfo = hello.model
        self.model_info.clear()
        self.model_info.labels(
            model.name,
            model.base.config.architecture,
            model.base.dtype,
            model.device,
            model.kernels,
            model.base.fingerprint,
        ).set(1)
        self._free_blocks.set(hello.num_blocks)
        self._used_blocks.set(0)
        for tier, budget in (
            ("device", hello.adapter_budget_bytes),
            ("host", hello.host_budget_bytes),
            ("merged", hello.merge_budget_bytes),
        ):
            self.adapter_budget_bytes.labels(tier).set(budget)
        self._prefix_blocks = hello.prefix_blocks
        self._holds_nothing()
        self.engine_ready.set(1)

    def on_restart(self) -> None:
        """The engine is gone and is being started again: it counts from 0, and holds nothing."""
        self.engine_restarts.inc()
        self.engine_ready.set(0)
        self._since_start.clear()
        self._holds_nothing()

    def on_step(self, done: StepDone) -> None:
        """One step's statistics."""
        stats = done.stats
        if stats.decode_rows or stats.prefill_tokens:
            self._decode_rows.observe(stats.decode_rows)
            self._base_rows.observe(stats.base_rows)
            self._merged_rows.observe(stats.merged_rows)
            self.distinct_adapters.observe(stats.distinct_adapters)
            self.step_seconds.observe(stats.step_seconds)
            self.prefill_tokens.inc(stats.prefill_tokens)
        self._free_blocks.set(stats.free_blocks)
        self._used_blocks.set(stats.used_blocks)
        self._hold(stats.adapter_bytes, stats.host_bytes, stats.merged_bytes, stats.prefix_blocks)
        for counter, value in (
            (self.preemptions, stats.preemptions),
            (self._device_evictions, stats.evictions),
            (self._host_evictions, stats.host_evictions),
            (self.prefetches, stats.prefetches),
            (self.prefetch_hits, stats.prefetch_hits),
        ):
            # The engine counts from its start, a Prometheus counter goes on over it.
            counter.inc(max(0, value - self._since_start.get(counter, 0)))
            self._since_start[counter] = value
        if done.adapters is not None:
            states = [adapter.state for adapter in done.adapters]
            states += ["pinned" for adapter in done.adapters if adapter.pinned]
            states += ["merged" for adapter in done.adapters if adapter.merged_bytes]
            for state in STATES:
                self.adapters.labels(state).set(states.count(state))

    def on_load(self, done: LoadDone) -> None:
        """An adapter load ended."""
        result = "ok" if done.error is None else "error"
        self.adapter_loads.labels(done.tier, result).inc()
        if done.error is None:
            self.adapter_load_seconds.labels(done.tier).observe(done.seconds)

    def on_merge(self, done: MergeDone) -> None:
        """An adapter was merged or unmerged, or was not."""
        change = "merge" if done.merged else "unmerge"
        cause = "automatic" if done.automatic else "order"
        self.merges.labels(change, cause, "ok" if done.error is None else "error").inc()
        if done.error is None and done.merged:
            self.merge_seconds.observe(done.seconds)
        for weights, seconds in (
            ("unmerged", done.unmerged_step_seconds),
            ("merged", done.merged_step_seconds),
        ):
            if seconds:
                self.merge_step_seconds.labels(weights).set(seconds)

    def _hold(self, device: int, host: int, merged: int, prefix_blocks: int) -> None:
        for tier, size in (("device", device), ("host", host), ("merged", merged)):
            self.adapter_bytes.labels(tier).set(size)
        self.prefix_blocks.labels("used").set(prefix_blocks)
        self.prefix_blocks.labels("free").set(self._prefix_blocks - prefix_blocks)

    def _holds_nothing(self) -> None:
        self._hold(0, 0, 0, 0)
        for state in STATES:
            self.adapters.labels(state).set(0)

    # what the RPC layer reports

    def rpc_ended(self, method: str, code: str, seconds: float, reason: str = "") -> None:
        """An RPC ended with the named gRPC code; `reason` is of the error table, "" when well."""
        self.requests.labels(method, code).inc()
        self.duration.labels(method).observe(seconds)
        if reason:
            self.rejected.labels(reason).inc()

    def generation_started(self, adapters: Iterable[str], prompt_tokens: int) -> None:
        """A request's prompt is computed; `adapters` are registered names, empty for the base."""
        self.prompt_tokens.inc(prompt_tokens)
        for name in adapters or ("",):
            self.adapter_tokens.labels(self._labels.label(name), "prompt").inc(prompt_tokens)

    @contextmanager
    def generation(self, adapters: Iterable[str]) -> Iterator[None]:
        """A resolved request, from its submission to its end; `adapters` as above."""
        # A deleted adapter's series is gone from the registry by then; these still count, unseen.
        gauges = [self.adapter_active.labels(self._labels.label(n)) for n in adapters or ("",)]
        for one in gauges:
            one.inc()
        try:
            yield
        finally:
            for one in gauges:
                one.dec()

    def generation_ended(self, adapters: Iterable[str], code: str, tokens: int) -> None:
        """A resolved request ended with the named gRPC code, having returned `tokens`."""
        self.generated_tokens.inc(tokens)
        for name in adapters or ("",):
            label = self._labels.label(name)
            self.adapter_last_use.labels(label).set_to_current_time()
            self.adapter_requests.labels(label, code).inc()
            self.adapter_tokens.labels(label, "completion").inc(tokens)

    def adapter_registered(self, name: str) -> None:
        """The name is registered. Idempotent."""
        self._labels.add(name)
        self._registered.set(len(self._labels))

    def adapter_unloaded(self, result: str) -> None:
        """An ordered unload ended: "ok" or "error"."""
        self.unloads.labels(result).inc()

    # what the training jobs report

    def training_jobs(self, queued: int, running: int) -> None:
        """How many there are now."""
        self.training.labels("queued").set(queued)
        self.training.labels("running").set(running)

    def training_ended(self, result: str, tokens: int) -> None:
        """A job has ended for good; `tokens` were trained on since it was last begun."""
        self.training_ends.labels(result).inc()
        self.training_tokens.inc(tokens)

    def adapter_deleted(self, name: str) -> None:
        """Drops the series of a deleted name; what still runs under it counts as `_other`."""
        if self._labels.remove(name):
            for family in (
                self.adapter_requests,
                self.adapter_tokens,
                self.adapter_active,
                self.adapter_last_use,
            ):
                family.remove_by_labels({"adapter": name})
        self._registered.set(len(self._labels))


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> tuple[WSGIServer, Thread]:
    """Serves /metrics from its own thread; port 0 takes a free one. OSError if it is taken."""
    return start_http_server(port, addr=host, registry=registry)
