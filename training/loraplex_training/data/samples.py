"""Tokenised examples and the micro-batches that they are laid into: what data gives to training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Sample:
    """One example.

    Attributes:
        tokens: ids of the whole example, a last EOS included.
        learned: for each token whether it is learned, that is, predicted from those before it.
            Never true of the first.
        prompt: how many tokens come before the first learned one; what is generated from for the
            metric and the samples before and after.
        reference: the text that should follow the prompt.
        line: where it was in its file, from 1.
        truncated: tokens that were cut off.
    """

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]
    prompt: int
    reference: str
    line: int
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Whole examples side by side, without padding; no token sees another example's.

    Attributes:
        tokens: int64 [T].
        starts: [S + 1]; example s owns `tokens[starts[s]:starts[s + 1]]`.
        targets: int64 [T]: the token that follows, where it is learned, else `IGNORED`. The last
            token of an example has none.
    """

    tokens: torch.Tensor
    starts: tuple[int, ...]
    targets: torch.Tensor

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return int((self.targets != IGNORED).sum())

    @staticmethod
    def of(samples: Sequence[Sample]) -> MicroBatch:
        """Lays examples side by side."""
        tokens: list[int] = []
        targets: list[int] = []
        starts = [0]
        for sample in samples:
            tokens += sample.tokens
            follows = zip(sample.tokens[1:], sample.learned[1:], strict=True)
            targets += [token if learned else IGNORED for token, learned in follows]
            targets.append(IGNORED)
            starts.append(len(tokens))
        return MicroBatch(torch.tensor(tokens), tuple(starts), torch.tensor(targets))
