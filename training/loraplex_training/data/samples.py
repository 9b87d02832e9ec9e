"""Tokenised examples and micro-batches: the data that training computes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Sample:
    """One example.

    Attributes:
        tokens: ids of the whole example, with the EOS at its end.
        learned: whether each token is learned, that is, counts in the loss. The first never is.
        prompt: number of tokens before the first learned one. Metrics and samples generate from
            these.
        reference: the text that should follow the prompt.
        line: line number in the file, from 1.
        truncated: number of tokens that were cut off.
    """

    tokens: tuple[int, ...]
    learned: tuple[bool, ...]
    prompt: int
    reference: str
    line: int
    truncated: int = 0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Whole examples side by side, without padding. Tokens attend to their own example only.

    Attributes:
        tokens: int64 [T].
        starts: [S + 1]; example s has `tokens[starts[s]:starts[s + 1]]`.
        targets: int64 [T]: the next token if that is learned, else `IGNORED`.
    """

    tokens: torch.Tensor
    starts: tuple[int, ...]
    targets: torch.Tensor

    @property
    def learned(self) -> int:
        """Number of learned tokens."""
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
