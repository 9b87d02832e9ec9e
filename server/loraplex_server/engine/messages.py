"""The messages between the front process and the engine process: msgpack on a unix socket.

Each frame is a 4-byte little-endian length and one msgpack-encoded message. Digests are
`sha256:<64 hex>`. Times are seconds of `time.monotonic()`, which both processes share.
"""

from __future__ import annotations

import msgspec
from loraplex_model.base.info import BaseInfo
from loraplex_model.base.refusal import Reason


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen; validated by the front. See `SamplingParams` of the proto."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0


class AdapterRef(msgspec.Struct, frozen=True):
    """Weights by content: what they are, where their files lie, and the factor to apply."""

    digest: str
    path: str
    weight: float = 1.0


# front -> engine


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A new request. Answered by `Output`s in `StepDone`; the last has a finish or an error.

    `stop_token_ids` holds the EOS ids too, unless they are to be ignored. `logprobs` and
    `prompt_logprobs` are how many alternatives to report, or None for no report at all.
    """

    id: int
    token_ids: list[int]
    max_new_tokens: int
    adapters: list[AdapterRef] = []
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: list[int] = []
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    deadline: float | None = None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Drop a request: no further output for it. Unknown ids are ignored (it may have finished)."""

    id: int


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Make an adapter resident. Answered by `ControlDone` with the same `op`."""

    op: int
    adapter: AdapterRef


class Unload(msgspec.Struct, frozen=True, tag="unload"):
    """Take an adapter off the device once its requests have finished; `force` aborts them first.

    Those that still run at `deadline` (seconds of `time.monotonic()`; None: never) are aborted
    then. Unpins it and drops it from host memory too. Answered by `ControlDone` when the memory is
    free. Aborted requests end with ADAPTER_UNLOADED.
    """

    op: int
    digest: str
    force: bool = False
    deadline: float | None = None


class Pin(msgspec.Struct, frozen=True, tag="pin"):
    """Make an adapter resident and keep it so (`pinned`), or let it go when room is needed.

    Answered by `ControlDone`, like `Load`; PIN_BUDGET when the pinned ones would take more than the
    engine allows.
    """

    op: int
    adapter: AdapterRef
    pinned: bool


class Merge(msgspec.Struct, frozen=True, tag="merge"):
    """Make an adapter resident and give it dense copies of the matrices that it changes.

    Answered by `ControlDone` when its rows use them; MERGE_BUDGET when there is no room for them,
    MERGE_UNSUPPORTED when it changes no matrix, PIN_BUDGET as for `Pin`: it is held on the device
    until it is unmerged or unloaded.
    """

    op: int
    adapter: AdapterRef


class Unmerge(msgspec.Struct, frozen=True, tag="unmerge"):
    """Drop an adapter's dense copies, after the merges of it that were ordered before.

    Answered by `ControlDone`; no error if there are none.
    """

    op: int
    digest: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the engine process now. The front drains before it sends this."""


Control = Load | Unload | Pin | Merge | Unmerge
"""Orders about adapters."""

ToEngine = Submit | Abort | Load | Unload | Pin | Merge | Unmerge | Shutdown

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
    """The engine is ready."""

    model: ModelInfo
    num_blocks: int
    block_size: int
    adapter_budget_bytes: int
    host_budget_bytes: int = 0
    merge_budget_bytes: int = 0
    prefix_blocks: int = 0
    """KV blocks beyond `num_blocks`, set aside for adapters' virtual tokens."""


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
    """A typed error: a stable reason of the error table, and a text that a client may see."""

    reason: Reason
    message: str


class Output(msgspec.Struct, frozen=True, omit_defaults=True):
    """One row's part of a step. `finish` is "stop" or "length"; a request ends with it or `error`.

    `started` is set on the first output of a request, when its prompt has been computed.
    A stop token is not among `token_ids`.
    """

    id: int
    token_ids: list[int] = []
    logprobs: list[Logprobs] = []
    prompt_logprobs: list[Logprobs] = []
    started: bool = False
    cached_prompt_tokens: int = 0
    queue_seconds: float = 0.0
    finish: str | None = None
    error: Failure | None = None


class AdapterStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """An adapter the engine knows of.

    `state` is "host" (packed, in host memory), "loading" (on its way to the device), "resident" or
    "draining". Times are seconds; `last_used` is of `time.monotonic()`, 0 if never.
    """

    digest: str
    state: str
    bytes: int
    """On the device; 0 unless it is there."""
    refs: int
    path: str = ""
    """Where its files lie, so that it can be loaded again into a new engine."""
    host_bytes: int = 0
    merged_bytes: int = 0
    """Of its dense copies; 0 unless merged."""
    prefix_blocks: int = 0
    pinned: bool = False
    last_used: float = 0.0
    load_seconds: float = 0.0
    """How long its last load took, from the store or from host memory."""


class StepStats(msgspec.Struct, frozen=True):
    """The engine after one step; gauges unless said otherwise."""

    step: int
    step_seconds: float
    decode_rows: int
    prefill_tokens: int
    distinct_adapters: int
    base_rows: int
    running: int
    waiting: int
    waiting_tokens: int
    free_blocks: int
    used_blocks: int
    preemptions: int
    """Counted since the engine started."""
    adapter_bytes: int
    evictions: int
    """Counted since the engine started."""
    host_bytes: int = 0
    merged_bytes: int = 0
    prefix_blocks: int = 0
    """In use, of those set aside for virtual tokens."""
    merged_rows: int = 0
    """Rows of this step that used dense copies."""
    host_evictions: int = 0
    """Adapters pushed out of host memory, since the engine started."""
    prefetches: int = 0
    """Adapters read into host memory ahead of their turn, since the engine started."""
    prefetch_hits: int = 0
    """Those of them that were wanted then."""


class StepDone(msgspec.Struct, frozen=True, tag="step"):
    """Everything that one step brought, in one message."""

    outputs: list[Output]
    stats: StepStats
    adapters: list[AdapterStatus] | None = None
    """The whole table, when it has changed since the last message."""


class LoadDone(msgspec.Struct, frozen=True, tag="load_done"):
    """An adapter load ended, whoever asked for it (for metrics).

    `tier` is where it came from: "disk" or "host".
    """

    digest: str
    seconds: float
    error: Failure | None = None
    tier: str = "disk"


class MergeDone(msgspec.Struct, frozen=True, tag="merge_done"):
    """An adapter was merged or unmerged, by order or by the engine itself (for metrics).

    `automatic` ones come with the measurement that decided: seconds of a pass like those before,
    unmerged and merged (0 where not measured). They tell of a merge when it is kept, and of every
    end of one, a try that was not kept among them.
    """

    digest: str
    merged: bool
    seconds: float
    automatic: bool = False
    unmerged_step_seconds: float = 0.0
    merged_step_seconds: float = 0.0
    error: Failure | None = None


class ControlDone(msgspec.Struct, frozen=True, tag="done"):
    """The answer to a `Control`."""

    op: int
    error: Failure | None = None


FromEngine = Hello | Fatal | StepDone | LoadDone | MergeDone | ControlDone
