"""The messages between the front process and the engine process: msgpack on a unix socket.

Each frame is a 4-byte little-endian length and one msgpack-encoded message. Digests are
`sha256:<64 hex>`. Times are seconds of `time.monotonic()`, which both processes share.
"""

from __future__ import annotations

import msgspec


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

    Answered by `ControlDone` when the memory is free. Aborted requests end with ADAPTER_UNLOADED.
    """

    op: int
    digest: str
    force: bool = False


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the engine process now. The front drains before it sends this."""


ToEngine = Submit | Abort | Load | Unload | Shutdown

# engine -> front


class ModelInfo(msgspec.Struct, frozen=True):
    """What the front needs to know of the base model to tokenise and to validate adapters.

    `projections` maps a module name ("q_proj", ...) to its (in_features, out_features).
    """

    name: str
    architecture: str
    fingerprint: str
    dtype: str
    device: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    max_context: int
    eos_token_ids: list[int]
    projections: dict[str, tuple[int, int]]
    tokenizer_path: str
    kernels: str
    weight_bytes: int


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The engine is ready."""

    model: ModelInfo
    num_blocks: int
    block_size: int
    adapter_budget_bytes: int


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine could not start (bad model, no memory). `message` is for the operator."""

    reason: str
    message: str


class Logprobs(msgspec.Struct, frozen=True):
    """Log-probability of one token and of the most probable alternatives `(token id, logprob)`."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []


class Failure(msgspec.Struct, frozen=True):
    """A typed error: a stable reason of the error table, and a text that a client may see."""

    reason: str
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


class AdapterStatus(msgspec.Struct, frozen=True):
    """An adapter the engine knows of: state is "loading", "resident" or "draining"."""

    digest: str
    state: str
    bytes: int
    refs: int
    path: str = ""
    """Where its files lie, so that it can be loaded again into a new engine."""


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


class StepDone(msgspec.Struct, frozen=True, tag="step"):
    """Everything that one step brought, in one message."""

    outputs: list[Output]
    stats: StepStats
    adapters: list[AdapterStatus] | None = None
    """The whole table, when it has changed since the last message."""


class LoadDone(msgspec.Struct, frozen=True, tag="load_done"):
    """An adapter load ended, asked for by `Load` or by a request that needed it (for metrics)."""

    digest: str
    seconds: float
    error: Failure | None = None


class ControlDone(msgspec.Struct, frozen=True, tag="done"):
    """The answer to `Load` or `Unload`."""

    op: int
    error: Failure | None = None


FromEngine = Hello | Fatal | StepDone | LoadDone | ControlDone
