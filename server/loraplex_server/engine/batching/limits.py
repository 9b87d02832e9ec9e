"""Bounds of the engine, as its settings."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class EngineLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of the engine.

    Attributes:
        token_budget: tokens of one step, decode rows and prefill chunks together.
        max_running: requests that take part in a step.
        max_waiting: requests that wait for their first step; more are refused.
        max_waiting_tokens: prompt tokens of the waiting requests; a prompt beyond it is refused
            unless nothing waits.
        prompt_logprob_rows: prompt tokens of one step whose logits are all kept, of all requests
            together.
        prefix_cache: whether requests that begin alike share blocks; see `prefix_cache`.
        prompt_step_ratio: how many times as long as one that only decodes a step may take if rows
            decode; 0 sets no limit. See `StepCosts`.
        fair_weights: shares of accounts by name, in proportion to each other; else 1.
        max_queue_seconds: predicted wait above which a request is refused; 0 accepts any.
        adapter_turn: seconds that requests may keep an adapter on the device while another one
            waits for its place; 0 sets no limit.
    """

    token_budget: int = 512
    max_running: int = 64
    max_waiting: int = 256
    max_waiting_tokens: int = 1 << 18
    prompt_logprob_rows: int = 128
    prefix_cache: bool = True
    prompt_step_ratio: float = 2.0
    fair_weights: Mapping[str, float] = {}
    max_queue_seconds: float = 60.0
    adapter_turn: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.max_running <= self.token_budget:
            raise ValueError("max_running must be between 1 and token_budget")
        if min(self.max_waiting, self.max_waiting_tokens, self.prompt_logprob_rows) < 1:
            raise ValueError("every limit must be positive")
        if not all(0 < weight < float("inf") for weight in self.fair_weights.values()):
            raise ValueError("every weight must be positive")
