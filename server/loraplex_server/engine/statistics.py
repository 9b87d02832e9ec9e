"""What an engine reports of itself: the figures of a step, and on request the batch."""

from __future__ import annotations

import msgspec


class StepStats(msgspec.Struct, frozen=True):
    """State of the engine after one step. Gauges, or numbers since its start if so stated."""

    step: int
    step_seconds: float
    decode_rows: int
    prefill_tokens: int
    distinct_adapters: int
    base_rows: int
    running: int
    waiting: int
    free_blocks: int
    used_blocks: int
    preemptions: int  # since the start
    adapter_bytes: int
    evictions: int  # since the start
    host_bytes: int = 0
    merged_bytes: int = 0
    prefix_blocks: int = 0
    """Blocks in use, of those set aside for virtual tokens."""
    merged_rows: int = 0
    """Number of rows of this step that used dense copies."""
    host_evictions: int = 0
    """Adapters evicted from host memory, since the start."""
    prefetches: int = 0
    """Adapters read into host memory before they were needed, since the start."""
    prefetch_hits: int = 0
    """Number of these adapters that were then used."""
    waiting_turns: int = 0
    """Requests that wait for their turn, because choosing their next token is costly."""
    memory_bytes: int = 0
    """Anonymous memory of the engine process, at most some seconds old; 0 if unknown."""
    accounted_bytes: int = 0
    """Memory of the process before the first adapter, and that of all adapters by budget."""
    wasted_rows: int = 0
    """Rows computed for requests that had ended meanwhile, since the start."""
    out_of_memory: int = 0
    """Passes for which device memory did not suffice, since the start."""
    waiting_accounts: int = 0
    """Accounts with a request that waits for its start."""
    set_back: int = 0
    """Requests that had to give up their adapter's place, since the start."""
    kept_blocks: int = 0
    """Blocks that the prefix cache has kept, in use or free."""
    prefix_lookups: int = 0
    """Admissions of requests that may use blocks of the prefix cache, since the start."""
    prefix_hits: int = 0
    """Number of these that used some."""
    prefix_evictions: int = 0
    """Blocks of the prefix cache that were reserved for other content, since the start."""
    mask_seconds: list[float] = []
    """Durations of the masks of structured output that were computed since the last step."""


class Look(msgspec.Struct, frozen=True, tag="look"):
    """A question for the batch as it is now. Answered between two steps, by a `BatchView`.

    It is sent only while somebody watches; nothing is counted for it otherwise.
    """

    op: int


class BatchView(msgspec.Struct, frozen=True, tag="batch"):
    """The requests of an engine by their stages, and what they hold. The answer to a `Look`.

    `prefill`, `decode` and `waiting` are numbers of requests as in `Submit.id`. Steps and tokens
    count since the engine's start, blocks are those for requests.
    """

    op: int
    prefill: list[int] = []
    """Requests that run and have more than one token to compute."""
    decode: list[int] = []
    """Requests that run otherwise."""
    waiting: list[int] = []
    """Requests that wait for their adapters, for KV blocks or for a place."""
    steps: int = 0
    generated_tokens: int = 0
    prompt_tokens: int = 0
    """Tokens computed in chunks: of prompts, and again after a preemption."""
    blocks: int = 0
    used_blocks: int = 0
    cached_blocks: int = 0
    """Blocks that are kept and that no request uses."""
    adapter_bytes: int = 0
    adapter_bytes_limit: int = 0
    max_rows: int = 0
