"""The results of calls: plain frozen values, without protobuf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum


class FinishReason(StrEnum):
    """The reason why a completion ended."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_new_tokens or the context length was reached


class AdapterState(StrEnum):
    """Whether an adapter is on the device."""

    UNSPECIFIED = "unspecified"
    STORED = "stored"  # not on the device
    LOADING = "loading"  # on the way to the device
    RESIDENT = "resident"  # on the device
    DRAINING = "draining"  # on the device until its running requests finish


class AdapterTier(StrEnum):
    """The fastest memory that holds an adapter."""

    UNSPECIFIED = "unspecified"
    DISK = "disk"
    HOST = "host"
    DEVICE = "device"


class AdapterEventKind(StrEnum):
    """The kind of a change of an adapter."""

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
    """The health of a server or of one of its services."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    SERVICE_UNKNOWN = "service_unknown"


@dataclass(frozen=True, slots=True)
class ResolvedAdapter:
    """The adapter that computed a completion.

    `digest` identifies its bytes: "sha256:" and 64 hex digits. `weight` is the factor on its delta.
    """

    name: str
    version: int
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens.

    `cached_prompt_tokens` are those of the prompt that the server had computed for an earlier
    request and did not compute again.
    `base_prompt_tokens` are those that the base model alone computed before an activated LoRA; if
    they are all of the prompt, it does not contain the adapter's invocation tokens, and the
    completion is the base model's.
    """

    prompt_tokens: int
    completion_tokens: int
    base_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token, the natural logarithm of its probability, and its text decoded alone.

    `raw` are the token's bytes, which may be a part of a character. Those of all tokens, joined,
    are the text with its special tokens. b"" from an older server. A text without special tokens
    leaves a `special` one out.
    """

    token_id: int
    logprob: float
    text: str
    raw: bytes = b""
    special: bool = False


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The token chosen at one position, and the most probable tokens there in falling order."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class MatchedStop:
    """What ended a completion: a stop string, or an end or stop token; the other one is None."""

    text: str | None = None
    token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """One more completion of the same prompt, for which `n` asked."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprobs, ...] = ()
    matched_stop: MatchedStop | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion.

    `adapters` is empty for the base model; `logprobs`, `prompt_logprobs` and `prompt_token_ids` are
    unless requested. `matched_stop` is set if the finish reason is STOP. `alternatives` are the
    second and further completions, if `n` is above 1.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    adapters: tuple[ResolvedAdapter, ...]
    request_id: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    matched_stop: MatchedStop | None = None
    alternatives: tuple[Alternative, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """The head of a stream, sent once the prompt has been computed with these adapters."""

    request_id: str
    adapters: tuple[ResolvedAdapter, ...]
    prompt_tokens: int
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """New text and tokens of a stream.

    `text` may be empty while it could still become a stop string. `index` is the number of the
    completion, from 0.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a completion. `matched_stop` is set if the finish reason is STOP."""

    finish_reason: FinishReason
    usage: Usage
    adapters: tuple[ResolvedAdapter, ...]
    matched_stop: MatchedStop | None = None
    index: int = 0


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A registered adapter. Times are in UTC.

    `device_bytes` is 0 unless the adapter is resident, `merged_bytes` 0 unless it is merged.
    `last_use_time` and `load_seconds` are None if it has not been used or loaded since the server's
    engine started. `provenance` is what its trainer wrote into its files. `base_name` and
    `base_fingerprint` are those of the base model against which it was checked, "" if they are not
    known. `unservable` says why the server does not serve it; None if it does, or in a watch.
    `devices` names the devices that hold it, such as "cuda:1", if the server has several.
    `eos_token_ids` and `chat_template_sha256` are what the version brings in place of the base
    model's end tokens and chat template; () and "" if it brings none. `invocation_tokens` are the
    token ids from whose last occurrence in a prompt on an activated LoRA acts; () for others.
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
    load_seconds: float | None = field(default=None, metadata={"sent_as": "load_duration"})
    aliases: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    virtual_tokens: int = 0
    base_fingerprint: str = ""
    base_name: str = ""
    unservable: Finding | None = None
    devices: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    chat_template_sha256: str = ""
    invocation_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Registration:
    """The result of a registration.

    `created` is False if the name already had these bytes. `notes` are sentences about what has no
    effect, such as a tokenizer in the adapter's directory.
    """

    adapter: AdapterInfo
    created: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class UploadProgress:
    """Numbers of bytes of each file that have arrived and are stored safely."""

    config_bytes: int
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class UploadInfo:
    """An upload whose adapter is not registered yet.

    `peer` is the address of the client that started it, "" if it is not known. The upload is
    removed at `expire_time` unless another piece arrives.
    """

    upload_id: str
    config_bytes: int
    weights_bytes: int
    peer: str
    change_time: datetime
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of an adapter; `field` is the configuration key, tensor or file at fault."""

    reason: str
    field: str
    message: str


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The description of an adapter, read from its files.

    `device_bytes` is the device memory that it would take when resident.
    """

    digest: str
    peft_type: str
    rank: int
    target_modules: tuple[str, ...]
    size_bytes: int
    device_bytes: int
    virtual_tokens: int
    base_model: str
    provenance: Mapping[str, str]
    invocation_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Validation:
    """The result of checking an adapter: its faults or, if it has none, its description.

    `notes` are sentences about what has no effect, such as a tokenizer in its directory.
    """

    findings: tuple[Finding, ...]
    spec: AdapterSpec | None
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether the server would serve the adapter."""
        return self.spec is not None


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """All adapters in the order of their names. With `resync`, changes before it were missed."""

    adapters: tuple[AdapterInfo, ...]
    aliases: Mapping[str, str]  # alias -> "name@version"
    resync: bool = False


@dataclass(frozen=True, slots=True)
class AdapterEvent:
    """A change of an adapter.

    `adapter` is its present state, or its last state if it was deleted. `alias` is set if the
    change concerns an alias.
    """

    kind: AdapterEventKind = field(metadata={"sent_as": "type"})
    adapter: AdapterInfo
    alias: str = ""
