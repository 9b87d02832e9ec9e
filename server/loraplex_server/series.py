"""The table of Prometheus series: one declaration for each family that the server exports.

A family is named `loraplex_` and its attribute's name. Each label lists its initial values: their
combinations exist from the start, at 0, so that a rate has no gap before the first event.
docs/operations.md explains the families to operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, Final, Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

BASE_LABEL: Final = "_base"
OTHER_LABEL: Final = "_other"
ADAPTER_STATES: Final = ("host", "loading", "resident", "draining", "pinned", "merged")
"""States of an adapter in the engine; a resident one can also be pinned and merged."""
DEATH_CAUSES: Final = ("exit", "signal", "silent", "stuck", "start")
"""Ways in which an engine process is lost; see `Cause` of its supervisor."""

_LONG: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_SHORT: Final = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, *_LONG[4:9])
_ROWS: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MASKS: Final = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.1)
"""Bucket bounds of histograms: seconds of a request and of a step, rows of a step, seconds of a
mask."""

_NAMES: Final = (BASE_LABEL, OTHER_LABEL)
_TIERS: Final = ("device", "host", "merged")
_RESULTS: Final = ("ok", "error")

M = TypeVar("M", bound=MetricWrapperBase)


class _Family(Generic[M]):
    """Declares a family in a class; each instance of the class gets a family of its own."""

    def __init__(
        self, kind: type[M], text: str, labels: Mapping[str, Sequence[str]], **options: Any
    ) -> None:
        self._make = partial(kind, documentation=text, labelnames=tuple(labels), **options)
        self._initial = list(product(*labels.values())) if labels else []

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, series: Series, owner: type) -> M:
        # Called once for each instance, whose own attribute hides this one from then on.
        made = self._make(name=f"loraplex_{self._name}", registry=series.registry)
        for values in self._initial:
            made.labels(*values)
        vars(series)[self._name] = made
        return made


def _counter(text: str, /, **labels: Sequence[str]) -> _Family[Counter]:
    return _Family(Counter, text, labels)


def _gauge(text: str, /, **labels: Sequence[str]) -> _Family[Gauge]:
    return _Family(Gauge, text, labels)


def _histogram(
    buckets: Sequence[float], text: str, /, **labels: Sequence[str]
) -> _Family[Histogram]:
    return _Family(Histogram, text, labels, buckets=buckets)


class Series:
    """All families of one server, registered with `registry`."""

    requests = _counter("RPCs that ended.", method=(), code=())
    rejected_requests = _counter("Requests refused or failed.", reason=())
    audit_lines = _counter("Lines of the audit log.", result=("written", "lost", "left_out"))
    queue_depth = _gauge("Requests whose prompt is not computed yet.")
    queued_tokens = _gauge("Prompt tokens of the requests in the queue.")
    running_requests = _gauge("Requests that are producing tokens.")
    queue_wait_seconds = _histogram(_LONG, "Time from submission to the first scheduled step.")
    time_to_first_token_seconds = _histogram(
        _LONG, "Time from an RPC's arrival to its first token."
    )
    inter_token_latency_seconds = _histogram(
        _SHORT, "Time between the tokens of a request; the mean over tokens sent together."
    )
    oldest_waiting_request_seconds = _gauge(
        "Seconds that the oldest of the requests in the queue has waited; 0 if there is none."
    )
    open_calls = _gauge("Calls that run, streams and watches included.")
    lane_calls = _gauge(
        "Calls whose blocking work runs in, or waits for, the threads of a lane.", lane=(), state=()
    )
    request_duration_seconds = _histogram(
        _LONG, "Time from an RPC's arrival to its end.", method=()
    )
    event_loop_lag_seconds = _histogram(_LONG, "Time by which the event loop wakes a task late.")
    prompt_tokens = _counter("Prompt tokens of started requests.")
    cached_prompt_tokens = _counter("Prompt tokens that were found in the KV cache.")
    generated_tokens = _counter("Tokens returned to clients.")
    batch_rows = _histogram(
        _ROWS,
        "Rows of a step: all decode rows, those of the bare base, those of merged adapters.",
        kind=("decode", "base", "merged"),
    )
    prefill_tokens = _counter("Prompt tokens computed, repeats included.")
    batch_distinct_adapters = _histogram(_ROWS, "Different adapters in a step.")
    engine_step_seconds = _histogram(_SHORT, "Time that an engine step adds.")
    engine_memory_bytes = _gauge(
        "Memory of the engine process: in use, and accounted for.", kind=("used", "accounted")
    )
    sampling_waiting_requests = _gauge("Requests that wait for their turn of costly sampling.")
    kv_blocks = _gauge("KV cache blocks.", state=("free", "used"))
    kv_usage_ratio = _gauge("Part of the KV cache blocks that requests use, from 0 to 1.")
    kv_cache_info = _gauge("Constant 1.", block_size=(), num_blocks=())
    prefix_cache_blocks = _gauge("KV cache blocks kept for requests that begin alike.")
    prefix_cache_lookups = _counter("Admissions of requests that may use kept blocks.")
    prefix_cache_hits = _counter("Admissions of requests that used kept blocks.")
    prefix_cache_evictions = _counter("Kept blocks that were reserved for other content.")
    preemptions = _counter("Requests put back into the queue for lack of KV blocks.")
    waiting_accounts = _gauge("Accounts with a request that waits for its start.")
    set_back_requests = _counter("Requests that gave up their adapter's place for another one.")
    wasted_rows = _counter("Rows computed for requests that had ended meanwhile.")
    out_of_memory = _counter("Passes for which device memory did not suffice.")
    adapter_requests = _counter("Generations that ended, by adapter.", adapter=_NAMES, code=())
    adapter_tokens = _counter("Tokens by adapter.", adapter=_NAMES, kind=("prompt", "completion"))
    adapter_active_requests = _gauge("Generations that run or wait, by adapter.", adapter=_NAMES)
    adapter_last_use_timestamp_seconds = _gauge(
        "Unix time at which an adapter's last generation ended.", adapter=_NAMES
    )
    adapter_loads = _counter(
        "Loads onto the device, by tier of origin.", tier=("disk", "host"), result=_RESULTS
    )
    adapter_load_seconds = _histogram(
        _LONG,
        "Time to bring an adapter to the device; from disk with reading, checking and packing.",
        tier=("disk", "host"),
    )
    adapter_unloads = _counter("Unloads that were ordered.", result=_RESULTS)
    adapter_evictions = _counter("Adapters evicted from a tier.", tier=("device", "host"))
    adapter_prefetches = _counter("Adapters read into host memory ahead of their use.")
    adapter_prefetch_hits = _counter("Prefetched adapters that were used.")
    adapter_merges = _counter(
        "Merges and unmerges.",
        change=("merge", "unmerge"),
        cause=("order",),
        result=_RESULTS,
    )
    adapter_merge_seconds = _histogram(_LONG, "Time to compute the dense copies of an adapter.")
    adapters = _gauge("Adapters by state.", state=("registered", *ADAPTER_STATES))
    adapters_unservable = _gauge(
        "Adapters that are not served, by cause.", cause=("base", "missing", "quarantined")
    )
    directory_adapters = _gauge(
        "Folders of the adapter directory by state.", state=("registered", "waiting", "refused")
    )
    index_away_seconds = _gauge(
        "Seconds since the store's index stopped answering; 0 while it answers."
    )
    index_age_seconds = _gauge(
        "Seconds since the store's index has last shown whether names have changed."
    )
    adapter_bytes = _gauge("Bytes that adapters take.", tier=_TIERS)
    adapter_budget_bytes = _gauge("Bytes that adapters may take.", tier=_TIERS)
    adapter_prefix_blocks = _gauge("KV blocks for virtual tokens.", state=("free", "used"))
    access_reload_failed = _gauge(
        "1 while a file of principals or credentials is wrong and what it said before holds."
    )
    training_jobs = _gauge("Training jobs by state.", state=("queued", "running"))
    training_jobs_ended = _counter(
        "Training jobs that ended, by result.", result=("succeeded", "failed", "cancelled")
    )
    training_tokens = _counter("Tokens that ended training jobs were trained on.")
    engine_ready = _gauge("1 while the engine takes requests.")
    engine_restarts = _counter("Restarts of the engine.")
    engine_deaths = _counter(
        "Engine processes that ended, hung or could not be started.", cause=DEATH_CAUSES
    )
    engine_up = _gauge("1 while the engine on a device takes requests.", device=())
    engine_device_requests = _gauge(
        "Requests in the engine on a device, by state.", device=(), state=()
    )
    engine_device_adapters = _gauge("Adapters that are resident on a device.", device=())
    engine_device_memory_bytes = _gauge(
        "Memory that the process of the engine on a device uses.", device=()
    )
    engine_device_restarts = _counter("Restarts of the engine on a device.", device=())
    principal_requests = _counter(
        "Generations of a principal that ended or were refused.", principal=(), code=()
    )
    principal_tokens = _counter("Tokens by principal.", principal=(), kind=())
    principal_active_requests = _gauge("Generations that run or wait, by principal.", principal=())
    principal_limit = _gauge("Limits of the principals that have some.", principal=(), limit=())
    quota_refusals = _counter("Calls refused for a limit.", principal=(), limit=())
    structure_checks = _counter(
        "Requests with structured output, by the result of its check.",
        result=("accepted", "refused"),
    )
    structure_check_seconds = _histogram(_LONG, "Time to check a structure that was not known yet.")
    structure_mask_seconds = _histogram(
        _MASKS, "Time to compute which tokens may follow, for one token of one request."
    )
    memory_bytes = _gauge(
        "Memory of all processes of the server, and what they may use.", kind=("used", "limit")
    )
    memory_pressure = _gauge("What is refused for lack of memory, from 0 to 3.")
    trace_spans = _counter("Spans of traces that were sent.", result=("exported", "failed"))
    tls_certificate_expiry_timestamp_seconds = _gauge(
        "Unix time at which the server's certificate expires; 0 without TLS."
    )
    tls_reloads = _counter("Looks at changed files of TLS.", result=_RESULTS)
    build_info = _gauge("Constant 1.", version=())
    model_info = _gauge(
        "Constant 1.", model=(), architecture=(), dtype=(), device=(), kernels=(), fingerprint=()
    )

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        for name, declared in vars(type(self)).items():
            if isinstance(declared, _Family):
                getattr(self, name)
