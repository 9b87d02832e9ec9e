"""What calls return: plain frozen values, free of protobuf."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a completion ended."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"  # end-of-sequence, a stop token or a stop string
    LENGTH = "length"  # max_new_tokens or the context was reached


class AdapterState(StrEnum):
    """Where an adapter is."""

    UNSPECIFIED = "unspecified"
    STORED = "stored"
    LOADING = "loading"
    RESIDENT = "resident"
    DRAINING = "draining"


class HealthStatus(StrEnum):
    """What the server says of itself or of one of its services."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    SERVICE_UNKNOWN = "service_unknown"


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """Weights by their content: `digest` is "sha256:" and 64 hex digits; `weight` its factor."""

    name: str
    version: int
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts; `cached_prompt_tokens` of the prompt's came out of the prefix cache."""

    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, its natural-log probability under the model, and its text on its own."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The token at one position, and the most probable ones there, most probable first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion. `adapters` is empty for the base, `logprobs` unless asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    adapters: tuple[ResolvedAdapter, ...]
    request_id: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The head of a stream: the prompt has been computed, with these weights."""

    request_id: str
    adapters: tuple[ResolvedAdapter, ...]
    prompt_tokens: int
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new in a stream. `text` may be empty while a stop string is being decided."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a stream: why, at what cost, and with which weights it was computed."""

    finish_reason: FinishReason
    usage: Usage
    adapters: tuple[ResolvedAdapter, ...]


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A registered adapter. `device_bytes` is 0 unless it is resident; `create_time` is in UTC."""

    name: str
    version: int
    digest: str
    peft_type: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    state: AdapterState
    device_bytes: int
    active_requests: int
    create_time: datetime | None
    base_model: str


@dataclass(frozen=True, slots=True)
class Registration:
    """What `register_adapter` did; `created` is False when the name already had these bytes."""

    adapter: AdapterInfo
    created: bool
