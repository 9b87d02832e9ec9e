"""What answers must be: computed by the oracle's rule, or given by the real model alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rpc.harness import ask, expected, streamed


class Answers(Protocol):
    """Knows the right continuation of a prompt."""

    def prompts(self) -> Sequence[tuple[int, ...]]:
        """Prompts to choose from."""
        ...

    def right(self, prompt: tuple[int, ...], mix: Sequence[tuple[str, float]], count: int) -> Any:
        """The first `count` tokens for adapters by digest with weights; None if not known."""
        ...


class OracleAnswers:
    """Of the model without weights: a function of prompt, digests and positions."""

    def __init__(self, virtual: dict[str, int]) -> None:
        """`virtual` has the virtual tokens of adapters by digest; it may grow."""
        self._virtual = virtual
        self._prompts = [
            tuple(20 + (seed * 7 + i * i) % 40 for i in range(1 + seed % 37)) for seed in range(200)
        ]

    def prompts(self) -> Sequence[tuple[int, ...]]:
        return self._prompts

    def right(
        self, prompt: tuple[int, ...], mix: Sequence[tuple[str, float]], count: int
    ) -> list[int]:
        virtual = self._virtual.get(mix[0][0], 0) if mix else 0
        return expected(list(prompt), count, mix=list(mix), virtual=virtual)


class RealAnswers:
    """Of a real model: greedy answers that it gave before anything else ran.

    A row's bits depend on nothing but itself, so they must come again in any company.
    """

    COUNT = 24

    def __init__(self, prompts: Sequence[tuple[int, ...]]) -> None:
        self._prompts = prompts
        self._known: dict[tuple[tuple[int, ...], str], list[int]] = {}

    async def learn(self, generation: Any, adapters: dict[str, str]) -> None:
        """Asks for every prompt with every adapter, one after the other: names to digests."""
        for name, digest in {"": "", **adapters}.items():
            for prompt in self._prompts:
                request = ask(*prompt, new=self.COUNT, adapter=name, stop={"ignore_eos": True})
                tokens = []
                async for event in generation.GenerateStream(streamed(request)):
                    tokens += event.delta.token_ids
                self._known[prompt, digest] = tokens

    def prompts(self) -> Sequence[tuple[int, ...]]:
        return self._prompts

    def right(
        self, prompt: tuple[int, ...], mix: Sequence[tuple[str, float]], count: int
    ) -> list[int] | None:
        if len(mix) > 1 or (mix and mix[0][1] != 1.0):
            return None
        known = self._known.get((prompt, mix[0][0] if mix else ""))
        return None if known is None else known[:count]
