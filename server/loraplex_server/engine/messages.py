"""The messages between the front process and the engine process: msgpack on a unix socket.

Each frame is a 4-byte little-endian length and one msgpack-encoded message. Digests are
`sha256:<64 hex>`, with an addition for copies of some callers (`held_by`). Times are seconds of
`time.monotonic()`, which both processes share.
"""

from __future__ import annotations

import msgspec
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason

from loraplex_server.engine.parameters import SamplingParams as SamplingParams
from loraplex_server.engine.parameters import Structure as Structure
from loraplex_server.engine.statistics import BatchView, Look
from loraplex_server.engine.statistics import StepStats as StepStats


class AdapterRef(msgspec.Struct, frozen=True):
    """An adapter by its digest, the directory of its files, and the weight to apply.

    The digest of a copy that only some callers use ends with their name (`held_by`): it is apart.
    """

    digest: str
    path: str
    weight: float = 1.0


def held_by(holder: str, digest: str) -> str:
    """The engine's digest for the copy of `holder`; "" stands for all who have none of their own.

    `digest` is that of the adapter's files.
    """
    return f"{digest}/{holder}" if holder else digest


def files_digest(digest: str) -> str:
    """The digest of an adapter's files, from the engine's digest."""
    return digest.partition("/")[0]


def holder_of(digest: str) -> str:
    """Whose copy the engine's digest stands for; "" for the one that callers share."""
    return digest.partition("/")[2]


# front -> engine


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A new request, `request_id` in logs. The last of its `Output`s has a finish or an error.

    With `max_new_tokens` 0 only the prompt is computed. `stop_token_ids` includes the EOS ids
    unless they are to be ignored; none is chosen before `min_new_tokens` others. `logprobs` and
    `prompt_logprobs` are numbers of alternatives to report; None reports no log-probabilities.
    `structure` is what the text must be. `account`, as a part of that of `principal` if there is
    one, with its `weight`, pays for tokens;
    `priority` orders its requests. Only requests with the same `cache_salt` share keys and values.
    With `pooling`, "last" or "mean", no token is generated: the last output has the final state of
    the prompt's last token, or the mean of all, scaled to length 1 if `unit_length` is set.
    `max_new_tokens` is 1 then.
    """

    id: int
    token_ids: list[int]
    max_new_tokens: int
    adapters: list[AdapterRef] = []
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: list[int] = []
    min_new_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    deadline: float | None = None
    account: str = ""
    cache_salt: str = ""
    principal: str = ""
    weight: float = 1.0
    request_id: str = ""
    pooling: str = ""
    unit_length: bool = False
    structure: Structure | None = None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End a request without further output. Unknown ids are ignored (it may have finished)."""

    id: int


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Make an adapter resident. Answered by `ControlDone` with the same `op`."""

    op: int
    adapter: AdapterRef


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """Remove an adapter from the device once its requests have finished; `force` ends them first.

    Requests that still run at `deadline` (seconds of `time.monotonic()`; None: never) end then,
    with ADAPTER_UNLOADED. Also unpins the adapter and drops it from host memory. Answered by
    `ControlDone` when the memory is free.
    """

    op: int
    digest: str
    force: bool = False
    deadline: float | None = None


class SetPinned(msgspec.Struct, frozen=True, tag="pin"):
    """Make an adapter resident and never evict it (`pinned`), or allow its eviction again.

    Answered by `ControlDone`, like `Load`; PIN_BUDGET if the pinned adapters would take more than
    the engine allows.
    """

    op: int
    adapter: AdapterRef
    pinned: bool


class Merge(msgspec.Struct, frozen=True, tag="merge"):
    """Make an adapter resident and compute dense copies of the matrices that it changes.

    Answered by `ControlDone` when rows use the copies; MERGE_BUDGET if there is no room for them,
    MERGE_UNSUPPORTED if the adapter changes no matrix, PIN_BUDGET as for `SetPinned`: the adapter
    stays on the device until it is unmerged or unloaded.
    """

    op: int
    adapter: AdapterRef


class Unmerge(msgspec.Struct, frozen=True, tag="unmerge"):
    """Drop an adapter's dense copies, after the merges of it that were ordered before.

    Answered by `ControlDone`; not an error if the adapter is not merged.
    """

    op: int
    digest: str


class Withdraw(msgspec.Struct, frozen=True, tag="withdraw"):
    """Nobody waits for the answer to the order `op` any more.

    An adapter that is wanted for this order alone is not loaded, pinned or merged, unless that has
    begun. An unload or unmerge is carried out. The answer is dropped; unknown numbers are ignored.
    """

    op: int


class LimitHost(msgspec.Struct, frozen=True, tag="limit_host"):
    """Keep so many bytes of idle adapters in host memory; None: the budget. Not answered."""

    nbytes: int | None


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the engine process now. The front drains before it sends this."""


Control = Load | Unload | SetPinned | Merge | Unmerge | Withdraw
"""Orders about adapters, and their withdrawal."""

ToEngine = Submit | Abort | Control | LimitHost | Look | Shutdown

# engine -> front


class ModelInfo(msgspec.Struct, frozen=True):
    """The base model, and how the engine runs it. `kernels` computes: "C++ <isa>" or "torch"."""

    base: BaseInfo
    name: str
    device: str
    kernels: str
    tokenizer_path: str
    max_context: int
    eos_token_ids: list[int]


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The engine is ready. `num_slots` adapters can be on its device, whatever their size."""

    model: ModelInfo
    num_blocks: int
    block_size: int
    adapter_budget_bytes: int
    host_budget_bytes: int = 0
    merge_budget_bytes: int = 0
    prefix_blocks: int = 0
    """KV blocks beyond `num_blocks`, set aside for adapters' virtual tokens."""
    num_slots: int = 0


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine could not start (bad model, no memory). `message` is for the operator."""

    reason: Reason
    message: str


class Logprobs(msgspec.Struct, frozen=True):
    """Log-probability of one token and of the most probable alternatives `(token id, logprob)`."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Failure(msgspec.Struct, frozen=True):
    """A typed error: a stable reason of the error table, and a message that a client may see."""

    reason: Reason
    message: str


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request's part of a step. The last output of a request has a `finish` or an `error`.

    `finish` is "stop" or "length". `stop_token` is the token that stopped the request; it is not in
    `token_ids`. A text that is complete by its structure stops without one. `started` is set on a
    request's first output, when its prompt has been computed; `base_tokens` is then the number of
    prompt tokens that the base alone computed, of a request with an activated LoRA, and
    `cached_tokens` the number of those whose keys and values were found in the KV cache, of any
    request. `queue_seconds` lasts until its first step, `load_seconds` until its adapters are on
    the device; 0 if they are there when it arrives. `state` has float32
    numbers in the machine's byte order, in the last output of a request with `pooling`.
    """

    id: int
    token_ids: list[int] = []
    logprobs: list[Logprobs] = []
    prompt_logprobs: list[Logprobs] = []
    started: bool = False
    base_tokens: int = 0
    cached_tokens: int = 0
    queue_seconds: float = 0.0
    load_seconds: float = 0.0
    finish: str | None = None
    error: Failure | None = None
    stop_token: int | None = None
    state: bytes = b""


class PromptScores(msgspec.Struct, frozen=True, tag="scores"):
    """Log-probabilities of a part of one request's prompt, in order.

    Sent before the `StepReport` whose output they belong to, if they are too many for one frame.
    """

    id: int
    logprobs: list[Logprobs]


class AdapterStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """An adapter that is on the device, in host memory, or on its way.

    `state` is "host" (packed, in host memory), "loading" (on its way to the device), "resident" or
    "draining". `last_used` is in seconds of `time.monotonic()`; 0 if never.
    """

    digest: str
    state: str
    bytes: int
    """Bytes on the device; 0 unless the adapter is there."""
    refs: int
    """Number of requests that use it."""
    path: str = ""
    """Directory of its files, from which a new engine can load it again."""
    host_bytes: int = 0
    merged_bytes: int = 0
    """Bytes of its dense copies; 0 unless merged."""
    prefix_blocks: int = 0
    pinned: bool = False
    last_used: float = 0.0
    load_seconds: float = 0.0
    """Duration of its last load, from its files or from host memory."""
    devices: list[str] = []
    """Devices that hold it, if there are several engines; set by the front."""


class StepReport(msgspec.Struct, frozen=True, tag="step"):
    """Outputs and statistics of one step."""

    outputs: list[Output]
    stats: StepStats
    adapters: list[AdapterStatus] | None = None
    """The whole table of adapters; None if it has not changed since it was last sent."""


class LoadDone(msgspec.Struct, frozen=True, tag="load_done"):
    """An adapter load ended, by order or for a request (for metrics).

    `tier` is the source of the weights: "disk" or "host".
    """

    digest: str
    seconds: float
    error: Failure | None = None
    tier: str = "disk"


class MergeDone(msgspec.Struct, frozen=True, tag="merge_done"):
    """A merge of an adapter, or an unmerge if `merged` is False, ended or failed (for metrics)."""

    digest: str
    merged: bool
    seconds: float
    error: Failure | None = None


class ControlDone(msgspec.Struct, frozen=True, tag="done"):
    """The answer to a `Control`."""

    op: int
    error: Failure | None = None


class Attempt(msgspec.Struct, frozen=True, tag="attempt"):
    """A "load" or "merge" begins, or has ended. The process may not survive such `work`."""

    digest: str
    work: str
    begun: bool


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """The process runs. Sent at regular intervals by a thread of its own.

    `turns` is the number of turns of the main loop so far. `waiting` is True while the loop waits
    for messages; then `turns` need not grow.
    """

    turns: int
    waiting: bool


Reply = ControlDone | LoadDone | MergeDone
"""Answers to orders, and notices of ended loads and merges."""

FromEngine = Hello | Fatal | StepReport | PromptScores | Reply | BatchView | Attempt | Beat
