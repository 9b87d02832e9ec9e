"""Sampling by the kernels, as the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from loraplex_model.decoder.sampling import NativeSampling
from numpy.typing import NDArray

from loraplex_server.engine.messages import Logprobs


class NativeSampler:
    """A `RowSampler` over the kernels of a decoder on the CPU."""

    def __init__(self, native: NativeSampling) -> None:
        self._native = native

    def choose(
        self, logits: NDArray[np.float32], lines: Sequence[int], draws: Sequence[int]
    ) -> list[int]:
        """One token for each row; -1 if its logits are not finite."""
        tokens: list[int] = self._native.choose(logits, np.array(lines, np.int32), draws).tolist()
        return tokens

    def logprobs(
        self,
        logits: NDArray[np.float32],
        lines: Sequence[int],
        tokens: Sequence[int],
        counts: Sequence[int],
    ) -> list[Logprobs]:
        """The log-probabilities of each row's token and of its most probable tokens."""
        wanted = np.minimum(np.array(counts, np.int32), np.int32(logits.shape[1]))
        chosen, ids, values = self._native.score(
            logits, np.array(lines, np.int32), np.array(tokens, np.int32), wanted
        )
        rows = zip(
            tokens, chosen.tolist(), wanted.tolist(), ids.tolist(), values.tolist(), strict=True
        )
        return [
            Logprobs(token, own, list(zip(of[:count], their[:count], strict=True)))
            for token, own, count, of, their in rows
        ]

    def finite(self, logits: NDArray[np.float32]) -> list[bool]:
        """For each line, whether all its logits are finite."""
        return self._native.finite(logits)
