"""How the rows of a step get tokens and log-probabilities: by the runner's kernels, or by numpy."""

from __future__ import annotations

from collections.abc import Sequence

from loraplex_server.engine.batching import sampler
from loraplex_server.engine.batching.sampler import Draw, Floats
from loraplex_server.engine.messages import Logprobs
from loraplex_server.engine.runner.protocol import RowSampler


class Choices:
    """The sampler of an engine. Both forms choose the same tokens; see `batching.sampler`.

    Logits are float32 [lines, vocab]. Row r takes its logits from line `lines[r]`.
    """

    def __init__(self, native: RowSampler | None) -> None:
        self._native = native

    def takes_long(self, draw: Draw) -> bool:
        """Whether the next token of a request costs other rows noticeable time."""
        return self._native is None and draw.is_costly

    def choose(self, logits: Floats, lines: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """The next token of each row; `NON_FINITE` if its logits are not all finite."""
        if self._native is not None:
            return self._native.choose(logits, lines, [draw.address for draw in draws])
        is_whole = len(lines) == len(logits)
        return sampler.sample(logits if is_whole else logits[list(lines)], draws)

    def logprobs(
        self, logits: Floats, lines: Sequence[int], tokens: Sequence[int], counts: Sequence[int]
    ) -> list[Logprobs]:
        """For each row, the log-probabilities of its token and of its `counts` best tokens."""
        if not lines:
            return []
        if self._native is not None:
            return self._native.logprobs(logits, lines, tokens, counts)
        rows = zip(lines, tokens, counts, strict=True)
        return [sampler.logprobs(logits[line], token, count) for line, token, count in rows]

    def all_finite(self, logits: Floats) -> bool:
        """Whether all logits of all lines are finite."""
        finite = sampler.finite_rows if self._native is None else self._native.finite
        return all(finite(logits))
