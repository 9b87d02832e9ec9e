"""Choosing tokens and computing log-probabilities with the C++ kernels, all rows in one call."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int, c_void_p, sizeof

import numpy as np
from numpy.typing import NDArray

from loraplex_model.base.draws import DrawState
from loraplex_model.ops.build import Kernels

Floats = NDArray[np.float32]
Ids = NDArray[np.int32]


class NativeSampling:
    """The kernels' sampler on a number of threads. Not thread-safe.

    Logits are float32 [lines, vocab] and contiguous; `lines` are int32 [R], the line of each row. A
    row's result depends on its own line, parameters and state alone. Methods raise `MemoryError`.
    """

    def __init__(self, library: Kernels, threads: int) -> None:
        assert library.loraplex_draw_size() == sizeof(DrawState)
        self._library = library
        self._threads = c_int(threads)

    def choose(self, logits: Floats, lines: Ids, draws: Sequence[int]) -> Ids:
        """The next token of each row, int32 [R]; -1 if the row's logits are not all finite.

        `draws` are the addresses of the rows' `DrawState`, which this leaves as they are.
        """
        tokens = np.empty(len(lines), np.int32)
        fits = self._library.loraplex_choose(
            _address(logits),
            c_int(logits.shape[1]),
            _address(lines),
            (c_void_p * len(draws))(*draws),
            c_int(len(lines)),
            _address(tokens),
            self._threads,
        )
        if not fits:
            raise MemoryError(f"no memory to choose {len(lines)} tokens")
        return tokens

    def score(
        self, logits: Floats, lines: Ids, tokens: Ids, counts: Ids
    ) -> tuple[Floats, Ids, Floats]:
        """Log-probabilities under finite logits, without temperature, bias or penalty.

        Returns float32 [R], that of each row's token; and of each row's `counts` most probable
        tokens, of equals the first by id, the ids, int32 [R, n], and log-probabilities, float32
        [R, n], the largest first. n is the largest count; the rest of a row is undefined.
        """
        rows, most = len(lines), int(counts.max(initial=0))
        assert most <= logits.shape[1]
        chosen = np.empty(rows, np.float32)
        ids = np.empty((rows, most), np.int32)
        values = np.empty((rows, most), np.float32)
        fits = self._library.loraplex_score(
            _address(logits),
            c_int(logits.shape[1]),
            _address(lines),
            _address(tokens),
            _address(counts),
            c_int(rows),
            c_int(most),
            _address(chosen),
            _address(ids),
            _address(values),
            self._threads,
        )
        if not fits:
            raise MemoryError(f"no memory for the log-probabilities of {rows} rows")
        return chosen, ids, values

    def finite(self, logits: Floats) -> list[bool]:
        """For each line, whether all its logits are finite."""
        finite = np.empty(len(logits), np.int32)
        self._library.loraplex_finite(
            _address(logits),
            c_int(logits.shape[1]),
            c_int(len(logits)),
            _address(finite),
            self._threads,
        )
        found: list[bool] = finite.astype(bool).tolist()
        return found


def _address(array: NDArray[np.generic]) -> c_void_p:
    assert array.flags.c_contiguous
    return c_void_p(array.ctypes.data)
