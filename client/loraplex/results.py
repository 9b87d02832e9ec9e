"""What calls return: plain frozen values, free of protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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


class AdapterTier(StrEnum):
    """The nearest memory that holds an adapter."""

    UNSPECIFIED = "unspecified"
    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


class AdapterEventKind(StrEnum):
    """What happened to an adapter."""

    UNSPECIFIED = "unspecified"
    REGISTERED = "registered"
    REPLACED = "replaced"
    DELETED = "deleted"
    ALIAS_SET = "alias_set"
    ALIAS_REMOVED = "alias_removed"
    LABELLED = "labelled"
    LOADING = "loading"
    HOST = "host"
    RESIDENT = "resident"
    DRAINING = "draining"
    EVICTED = "evicted"
    MERGED = "merged"
    UNMERGED = "unmerged"
    PINNED = "pinned"
    UNPINNED = "unpinned"


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
    """A registered adapter. `device_bytes` is 0 unless it is resident; times are in UTC.

    `last_use_time` and `load_seconds` are None when it was not used, or not loaded, since the
    server's engine started. `provenance` is what its trainer stamped into its files.
    """

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
    tier: AdapterTier = AdapterTier.UNSPECIFIED
    host_bytes: int = 0
    merged_bytes: int = 0
    pinned: bool = False
    last_use_time: datetime | None = None
    load_seconds: float | None = None
    aliases: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    virtual_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Registration:
    """What `register_adapter` did; `created` is False when the name already had these bytes."""

    adapter: AdapterInfo
    created: bool


@dataclass(frozen=True, slots=True)
class UploadProgress:
    """How many bytes of each file have arrived and are safe."""

    config_bytes: int
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong with an adapter; `field` is the key, tensor or file at fault."""

    reason: str
    field: str
    message: str


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What an adapter's files say of it. `device_bytes` is what it would take when resident."""

    digest: str
    peft_type: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    device_bytes: int
    virtual_tokens: int
    base_model: str
    provenance: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Validation:
    """The judgement on an adapter: all that is wrong with it or, if nothing is, its spec."""

    findings: tuple[Finding, ...]
    spec: AdapterSpec | None

    @property
    def valid(self) -> bool:
        """Whether the server would serve it."""
        return self.spec is not None


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """All adapters by name, as a watch begins. With `resync`, changes were missed before it."""

    adapters: tuple[AdapterInfo, ...]
    aliases: Mapping[str, str]  # alias -> "name@version"
    resync: bool = False


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """A change. `adapter` is as it is now, or as it was last; `alias` where it is about one."""

    kind: AdapterEventKind
    adapter: AdapterInfo
    alias: str = ""
