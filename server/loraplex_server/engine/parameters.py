"""How the tokens of one request are chosen, as the front tells the engine."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling parameters, validated by the front; see `SamplingParams` of the proto."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0


class Structure(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the text of a completion must be, as a grammar that the front has checked.

    `is_json` says that the text is JSON. `end_token_ids` end the request, and are allowed only
    where the text is complete; without any, the request ends where the text cannot go on.
    """

    grammar: str
    is_json: bool = False
    end_token_ids: list[int] = []

    def ending_with(self, tokens: Iterable[int]) -> Structure:
        """The same with these end tokens."""
        return msgspec.structs.replace(self, end_token_ids=list(tokens))
