"""Turns what happens in the server into Prometheus metrics (`series` declares them).

An adapter's name is a label on counters and gauges only, never on histograms. Only registered names
become labels, at most `adapter_labels` of them; all others share `_other`. Deleting an adapter
removes its series.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from prometheus_client import CollectorRegistry

from loraplex_server.engine.messages import Hello, LoadDone, MergeDone, StepReport
from loraplex_server.name_labels import NameLabels
from loraplex_server.principal_series import PrincipalSeries
from loraplex_server.series import ADAPTER_STATES, Series
from loraplex_server.step_series import StepSeries
from loraplex_server.telemetry.residency import AdapterResidency
from loraplex_server.telemetry.trace import NO_TRACING, Tracing, open_tracing


class Metrics:
    """Writes the series of one server. It is also an observer of the engine.

    Attributes:
        series: the families that it writes.
        residency: which adapters are on the devices, for inference gateways.
        tracing: makes the spans of calls; by default it makes none.
        principals: the series of identified callers.
    """

    def __init__(
        self, registry: CollectorRegistry, version: str = "", adapter_labels: int = 200
    ) -> None:
        self.registry = registry
        self.series = Series(registry)
        self.residency = AdapterResidency()
        registry.register(self.residency)
        self.tracing: Tracing = NO_TRACING
        self._version = version
        self._labels = NameLabels(adapter_labels)
        self._steps = StepSeries(self.series)
        self.principals = PrincipalSeries(self.series)
        self.series.build_info.labels(version).set(1)

    def trace_to(self, endpoint: str) -> None:
        """Sends the spans of calls to `endpoint`, if that is not empty. Raises StartFailure."""
        self.tracing = open_tracing(endpoint, self._version, self.spans_ended)

    # events of the engine

    def on_ready(self, hello: Hello) -> None:
        """The engine is ready: sets the model's labels, the KV blocks and the budgets."""
        series, model = self.series, hello.model
        series.model_info.clear()
        series.model_info.labels(
            model.name,
            model.base.config.architecture,
            model.base.dtype,
            model.device,
            model.kernels,
            model.base.fingerprint,
        ).set(1)
        for tier, budget in (
            ("device", hello.adapter_budget_bytes),
            ("host", hello.host_budget_bytes),
            ("merged", hello.merge_budget_bytes),
        ):
            series.adapter_budget_bytes.labels(tier).set(budget)
        self._steps.show_ready(hello.num_blocks, hello.prefix_blocks)
        series.kv_cache_info.clear()
        series.kv_cache_info.labels(str(hello.block_size), str(hello.num_blocks)).set(1)
        self._clear_adapters()
        series.engine_ready.set(1)

    def on_restart(self) -> None:
        """The engine was lost. Its successor starts without adapters and counts from 0."""
        self.series.engine_restarts.inc()
        self.series.engine_ready.set(0)
        self._steps.show_lost()
        self._clear_adapters()

    def on_partial_loss(self) -> None:
        """One of several engines was lost, and others are up."""
        self.series.engine_restarts.inc()

    def on_death(self, cause: str) -> None:
        """An engine process has ended, or could not be started; `cause` is one of DEATH_CAUSES."""
        self.series.engine_deaths.labels(cause).inc()

    def on_step(self, done: StepReport) -> None:
        """Records the statistics of one step, and the table of adapters if it has changed."""
        self._steps.show(done.stats)
        series = self.series
        if done.adapters is not None:
            states = [adapter.state for adapter in done.adapters]
            states += ["pinned" for adapter in done.adapters if adapter.pinned]
            states += ["merged" for adapter in done.adapters if adapter.merged_bytes]
            for state in ADAPTER_STATES:
                series.adapters.labels(state).set(states.count(state))

    def on_load(self, done: LoadDone) -> None:
        """Records the end of an adapter load."""
        result = "ok" if done.error is None else "error"
        self.series.adapter_loads.labels(done.tier, result).inc()
        if done.error is None:
            self.series.adapter_load_seconds.labels(done.tier).observe(done.seconds)

    def on_merge(self, done: MergeDone) -> None:
        """Records the end of a merge or unmerge, successful or not."""
        change = "merge" if done.merged else "unmerge"
        result = "ok" if done.error is None else "error"
        self.series.adapter_merges.labels(change, "order", result).inc()
        if done.error is None and done.merged:
            self.series.adapter_merge_seconds.observe(done.seconds)

    def _clear_adapters(self) -> None:
        """Sets the numbers of adapters of an engine that has none."""
        for state in ADAPTER_STATES:
            self.series.adapters.labels(state).set(0)

    # events of the RPC layer

    def spans_ended(self, result: str, spans: int) -> None:
        """Records that spans were "exported" or that this has "failed". Called in any thread."""
        self.series.trace_spans.labels(result).inc(spans)

    def audit_lines(self, result: str, count: int) -> None:
        """Counts lines of the audit log: "written", "lost", or "left_out" for too many refusals."""
        self.series.audit_lines.labels(result).inc(count)

    def rpc_ended(self, method: str, code: str, seconds: float, reason: str = "") -> None:
        """Records an RPC's gRPC code and, if it failed, its reason of the error table."""
        self.series.requests.labels(method, code).inc()
        self.series.request_duration_seconds.labels(method).observe(seconds)
        if reason:
            self.series.rejected_requests.labels(reason).inc()

    def generation_started(
        self, adapters: Iterable[str], prompt_tokens: int, cached_tokens: int = 0
    ) -> None:
        """Records that a request's prompt is computed, or was partly found in the KV cache.

        `adapters` are the names of the request's adapters, empty for the base model.
        """
        self.series.prompt_tokens.inc(prompt_tokens)
        self.series.cached_prompt_tokens.inc(cached_tokens)
        for name in adapters or ("",):
            label = self._labels.label(name)
            self.series.adapter_tokens.labels(label, "prompt").inc(prompt_tokens)

    @contextmanager
    def generation(self, adapters: Iterable[str]) -> Iterator[None]:
        """Counts a request as active within the context; `adapters` as in `generation_started`."""
        # These gauges may outlive their series: deleting the adapter removes it from the registry.
        active = self.series.adapter_active_requests
        gauges = [active.labels(self._labels.label(name)) for name in adapters or ("",)]
        for gauge in gauges:
            gauge.inc()
        try:
            yield
        finally:
            for gauge in gauges:
                gauge.dec()

    def generation_ended(self, adapters: Iterable[str], code: str, tokens: int) -> None:
        """Records a request's gRPC code and the tokens that it returned."""
        series = self.series
        series.generated_tokens.inc(tokens)
        for name in adapters or ("",):
            label = self._labels.label(name)
            series.adapter_last_use_timestamp_seconds.labels(label).set_to_current_time()
            series.adapter_requests.labels(label, code).inc()
            series.adapter_tokens.labels(label, "completion").inc(tokens)

    # events of the registry

    def adapter_registered(self, name: str) -> None:
        """Records that the name is registered. Idempotent."""
        self._labels.add(name)
        self.series.adapters.labels("registered").set(len(self._labels))

    def unservable(self, counts: Mapping[str, int]) -> None:
        """Sets the numbers of adapters that are not served, for the causes in `counts`.

        The census of the registry sets "base" and "missing", the quarantine keeper "quarantined".
        """
        for cause, count in counts.items():
            self.series.adapters_unservable.labels(cause).set(count)

    def adapter_unloaded(self, result: str) -> None:
        """Records the end of an ordered unload: "ok" or "error"."""
        self.series.adapter_unloads.labels(result).inc()

    def adapter_deleted(self, name: str) -> None:
        """Removes the series of a deleted name; requests that still use it count as `_other`."""
        if self._labels.remove(name):
            for family in (
                self.series.adapter_requests,
                self.series.adapter_tokens,
                self.series.adapter_active_requests,
                self.series.adapter_last_use_timestamp_seconds,
            ):
                family.remove_by_labels({"adapter": name})
        self.series.adapters.labels("registered").set(len(self._labels))

    # events of the training jobs

    def training_jobs(self, queued: int, running: int) -> None:
        """Sets the number of jobs that are queued and running."""
        self.series.training_jobs.labels("queued").set(queued)
        self.series.training_jobs.labels("running").set(running)

    def training_ended(self, result: str, tokens: int) -> None:
        """Records the end of a job and the tokens that its last run was trained on."""
        self.series.training_jobs_ended.labels(result).inc()
        self.series.training_tokens.inc(tokens)
