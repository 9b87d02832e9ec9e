"""Turns the server's messages into the values of `results`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from loraplex import results
from loraplex.errors import cancelled_here, cut_short
from loraplex.v1 import adapter_pb2, generation_pb2

T = TypeVar("T")
M_contra = TypeVar("M_contra", contravariant=True)
T_co = TypeVar("T_co", covariant=True)


class Receiver(Protocol[M_contra, T_co]):
    """Turns the messages of a running call into the items that its reader gets."""

    def receive(self, message: M_contra, /) -> T_co | None:
        """Takes the next message; returns its item, or None if it completes none."""

    def end(self, cancelled: bool) -> None:
        """Takes the end of the call; `cancelled` by this side or not. Raises LoraplexError."""


_FINISH_REASONS: dict[int, results.FinishReason] = {
    generation_pb2.FINISH_REASON_STOP: results.FinishReason.STOP,
    generation_pb2.FINISH_REASON_LENGTH: results.FinishReason.LENGTH,
}

_STATES: dict[int, results.AdapterState] = {
    adapter_pb2.ADAPTER_STATE_STORED: results.AdapterState.STORED,
    adapter_pb2.ADAPTER_STATE_LOADING: results.AdapterState.LOADING,
    adapter_pb2.ADAPTER_STATE_RESIDENT: results.AdapterState.RESIDENT,
    adapter_pb2.ADAPTER_STATE_DRAINING: results.AdapterState.DRAINING,
}

_TIERS: dict[int, results.AdapterTier] = {
    adapter_pb2.ADAPTER_TIER_DISK: results.AdapterTier.DISK,
    adapter_pb2.ADAPTER_TIER_HOST: results.AdapterTier.HOST,
    adapter_pb2.ADAPTER_TIER_DEVICE: results.AdapterTier.DEVICE,
}


def optional(message: Message, field: str, read: Callable[[Any], T]) -> T | None:
    """Returns a field as `read` turns it into a value; None if the field is unset."""
    return read(getattr(message, field)) if message.HasField(field) else None


def time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)


def seconds(duration: Duration) -> float:
    return duration.ToTimedelta().total_seconds()


def completion(reply: generation_pb2.GenerateResponse) -> results.Completion:
    return results.Completion(
        text=reply.text,
        token_ids=tuple(reply.token_ids),
        finish_reason=_finish_reason(reply.finish_reason),
        usage=_usage(reply.usage),
        adapters=_resolved(reply.adapters),
        request_id=reply.request_id,
        logprobs=_logprobs(reply.logprobs),
        prompt_logprobs=_logprobs(reply.prompt_logprobs),
    )


def adapter(reply: adapter_pb2.Adapter) -> results.AdapterInfo:
    return results.AdapterInfo(
        name=reply.name,
        version=reply.version,
        digest=reply.digest,
        peft_type=reply.peft_type,
        rank=reply.rank,
        target_modules=tuple(reply.target_modules),
        size_bytes=reply.size_bytes,
        # A state that only newer servers know is no error.
        state=_STATES.get(reply.state, results.AdapterState.UNSPECIFIED),
        device_bytes=reply.device_bytes,
        active_requests=reply.active_requests,
        create_time=optional(reply, "create_time", time),
        base_model=reply.base_model,
        tier=_TIERS.get(reply.tier, results.AdapterTier.UNSPECIFIED),
        host_bytes=reply.host_bytes,
        merged_bytes=reply.merged_bytes,
        pinned=reply.pinned,
        last_use_time=optional(reply, "last_use_time", time),
        load_seconds=optional(reply, "load_duration", seconds),
        aliases=tuple(reply.aliases),
        labels=dict(reply.labels),
        provenance=dict(reply.provenance),
        virtual_tokens=reply.virtual_tokens,
    )


def registration(
    reply: adapter_pb2.RegisterAdapterResponse | adapter_pb2.UploadAdapterResponse,
) -> results.Registration:
    return results.Registration(adapter=adapter(reply.adapter), created=reply.created)


def upload(reply: adapter_pb2.GetUploadResponse) -> results.UploadProgress:
    return results.UploadProgress(reply.config_bytes, reply.weights_bytes)


def validation(reply: adapter_pb2.ValidateAdapterResponse) -> results.Validation:
    return results.Validation(
        findings=tuple(results.Finding(f.reason, f.field, f.message) for f in reply.findings),
        spec=optional(reply, "spec", _spec),
    )


class WatchLog:
    """Joins the parts of the table that a watch sends, and reads its changes."""

    def __init__(self) -> None:
        self._parts: list[results.AdapterInfo] = []
        self._resync = False

    def receive(
        self, message: adapter_pb2.WatchAdaptersResponse
    ) -> results.AdapterTable | results.AdapterEvent | None:
        """Returns the table with its last part, or a change; None for anything else."""
        match message.WhichOneof("event"):
            case "table":
                self._parts += map(adapter, message.table.adapters)
                if not message.table.complete:
                    return None
                aliases = {a.alias: f"{a.name}@{a.version}" for a in message.table.aliases}
                table = results.AdapterTable(tuple(self._parts), aliases, self._resync)
                self._parts, self._resync = [], False
                return table
            case "change":
                return results.AdapterEvent(
                    _event_kind(message.change.type),
                    adapter(message.change.adapter),
                    message.change.alias,
                )
            case "resync":
                self._parts, self._resync = [], True
        return None

    def end(self, cancelled: bool) -> None:
        """A watch may end at any time."""


def _event_kind(number: int) -> results.AdapterEventKind:
    """Returns the kind of the same name; UNSPECIFIED for a kind that only newer servers know."""
    known = adapter_pb2.AdapterChangeType.DESCRIPTOR.values_by_number.get(number)
    if known is None:
        return results.AdapterEventKind.UNSPECIFIED
    return results.AdapterEventKind(known.name.removeprefix("ADAPTER_CHANGE_TYPE_").lower())


def health(status: int) -> results.HealthStatus:
    """Returns the status; the numbers of `grpc.health.v1` follow the order of `HealthStatus`."""
    states = tuple(results.HealthStatus)
    return states[status] if 0 <= status < len(states) else results.HealthStatus.UNKNOWN


class Transcript:
    """Collects what a stream sends: its head, its deltas and its end."""

    def __init__(self) -> None:
        self.started: results.Started | None = None
        self.finished: results.Finished | None = None
        self._deltas: list[results.Delta] = []

    def receive(self, message: generation_pb2.GenerateStreamResponse) -> results.Delta | None:
        """Takes the next message; returns its delta, or None if it has none."""
        match message.WhichOneof("event"):
            case "started":
                self.started = results.Started(
                    request_id=message.started.request_id,
                    adapters=_resolved(message.started.adapters),
                    prompt_tokens=message.started.prompt_tokens,
                    prompt_logprobs=_logprobs(message.started.prompt_logprobs),
                )
            case "delta":
                delta = results.Delta(
                    text=message.delta.text,
                    token_ids=tuple(message.delta.token_ids),
                    logprobs=_logprobs(message.delta.logprobs),
                )
                self._deltas.append(delta)
                return delta
            case "finished":
                self.finished = results.Finished(
                    finish_reason=_finish_reason(message.finished.finish_reason),
                    usage=_usage(message.finished.usage),
                    adapters=self.started.adapters if self.started else (),
                )
        return None

    def end(self, cancelled: bool) -> None:
        """Raises Cancelled if this side cancelled, ServerFault if the last message is missing."""
        if cancelled:
            raise cancelled_here()
        self._whole()

    def completion(self) -> results.Completion:
        """Returns the whole stream as one value. Raises ServerFault before the end."""
        started, finished = self._whole()
        return results.Completion(
            text="".join(delta.text for delta in self._deltas),
            token_ids=tuple(token for delta in self._deltas for token in delta.token_ids),
            finish_reason=finished.finish_reason,
            usage=finished.usage,
            adapters=started.adapters,
            request_id=started.request_id,
            logprobs=tuple(entry for delta in self._deltas for entry in delta.logprobs),
            prompt_logprobs=started.prompt_logprobs,
        )

    def _whole(self) -> tuple[results.Started, results.Finished]:
        if self.started is None or self.finished is None:
            raise cut_short()
        return self.started, self.finished


def _finish_reason(number: int) -> results.FinishReason:
    return _FINISH_REASONS.get(number, results.FinishReason.UNSPECIFIED)


def _spec(spec: adapter_pb2.AdapterSpec) -> results.AdapterSpec:
    return results.AdapterSpec(
        digest=spec.digest,
        peft_type=spec.peft_type,
        rank=spec.rank,
        target_modules=tuple(spec.target_modules),
        size_bytes=spec.size_bytes,
        device_bytes=spec.device_bytes,
        virtual_tokens=spec.virtual_tokens,
        base_model=spec.base_model,
        provenance=dict(spec.provenance),
    )


def _usage(reply: generation_pb2.Usage) -> results.Usage:
    return results.Usage(reply.prompt_tokens, reply.completion_tokens)


def _resolved(
    reply: Iterable[generation_pb2.ResolvedAdapter],
) -> tuple[results.ResolvedAdapter, ...]:
    return tuple(results.ResolvedAdapter(a.name, a.version, a.digest, a.weight) for a in reply)


def _logprobs(
    reply: Iterable[generation_pb2.TokenLogprobs],
) -> tuple[results.TokenLogprobs, ...]:
    return tuple(
        results.TokenLogprobs(_logprob(entry.chosen), tuple(_logprob(top) for top in entry.top))
        for entry in reply
    )


def _logprob(reply: generation_pb2.TokenLogprob) -> results.TokenLogprob:
    return results.TokenLogprob(reply.token_id, reply.logprob, reply.text)
