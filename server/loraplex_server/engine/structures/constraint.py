"""The state of one request's structured output: what its next token may be.

    built and first mask ──▶ ready ──advance(token)──▶ next mask ──▶ ready ── ...
      (a worker's job)                                (a worker's job)

`advance` runs on the engine's thread and takes some microseconds. Everything that may take longer
is a job of the workers, which ends while the forward pass of the token is computed. A request whose
mask is late keeps its logits and stays out of the passes until the mask is there, so it delays no
other request; see `Answers`. What a mask allows depends on the grammar and on the request's own
tokens alone.

A constraint is used by one thread at a time: by a worker until it is `ready`, and then by the
engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from loraplex_model.base.refusal import Reason
from numpy.typing import NDArray

from loraplex_server.engine.messages import Failure
from loraplex_server.engine.structures.numerals import NumeralGuard

if TYPE_CHECKING:
    from llguidance import LLMatcher

Mask = NDArray[np.uint32]
"""One bit for each token of the vocabulary, the lowest bit of each word first; set: allowed."""

LIMIT = Failure(
    Reason.STRUCTURE_FAILED,
    "the structure needs more work for the next token than a request may take; simplify it",
)
NO_TOKEN = Failure(
    Reason.STRUCTURE_FAILED, "no token of the model can continue the text as the structure wants it"
)

log = logging.getLogger(__name__)


class Constraint:
    """What the next token of one request may be.

    Attributes:
        mask: the tokens that may follow, if `ready` and without a `failure`.
        ready: the mask has been computed, or there is a `failure`.
        failure: why the request cannot go on; None if it can.
    """

    def __init__(
        self,
        words: int,
        eos_token_ids: Sequence[int],
        end_token_ids: Sequence[int],
        note_seconds: Callable[[float], None],
    ) -> None:
        """A constraint that is not ready yet; `start` makes it so.

        Args:
            words: number of words of a mask.
            eos_token_ids: end tokens of the model, which are never a part of the text.
            end_token_ids: tokens that end the request, allowed where the text is complete.
            note_seconds: is told how long each mask took.
        """
        self.mask: Mask = np.zeros(words, np.uint32)
        self.ready = False
        self.failure: Failure | None = None
        self._ends = tuple(end_token_ids)
        self._never = tuple({*eos_token_ids, *end_token_ids})
        self._note_seconds = note_seconds
        self._guard: NumeralGuard | None = None
        self._matcher: LLMatcher | None = None

    def start(self, build: Callable[[], tuple[LLMatcher, NumeralGuard | None]]) -> None:
        """Builds the matcher and computes the first mask. A job of a worker.

        `build` returns the matcher, and for a JSON text the bound on its numerals.
        """
        try:
            self._matcher, self._guard = build()
        except BaseException as error:  # the library's panics are no `Exception`
            self._fault(error)
            return
        self.refill()

    def refill(self) -> None:
        """Computes the mask of the next token. A job of a worker."""
        assert self._matcher is not None, "a mask without a matcher"
        begun = time.perf_counter()
        try:
            self._fill(self._matcher)
        except BaseException as error:
            self._fault(error)
            return
        self._note_seconds(time.perf_counter() - begun)
        self.ready = True

    def advance(self, token: int) -> bool:
        """Notes the token that was chosen; returns whether the text is complete and cannot go on.

        If neither that holds nor there is a failure, the mask is out of date afterwards: `refill`
        must be called.
        """
        assert self.ready, "a token was chosen without its mask"
        assert self._matcher is not None, "a token without a matcher"
        self.ready = False
        try:
            fits = self._matcher.consume_token(token)
            is_complete = self._matcher.is_stopped()
        except BaseException as error:
            self._fault(error)
            return False
        if not fits or self._matcher.is_error():
            self._fail(self._reason(self._matcher))
            return False
        if self._guard is not None:
            self._guard.saw(token)
        return is_complete

    def _fill(self, matcher: LLMatcher) -> None:
        mask = self.mask
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():
            self._fail(self._reason(matcher))
            return
        may_end = matcher.is_accepting()
        for token in self._never:
            mask[token >> 5] &= ~np.uint32(1 << (token & 31))
        if self._guard is not None:
            self._guard.apply(mask)
        if may_end:
            for token in self._ends:
                mask[token >> 5] |= np.uint32(1 << (token & 31))
        if not mask.any():
            self._fail(NO_TOKEN)

    @staticmethod
    def _reason(matcher: LLMatcher) -> Failure:
        """Of the library's message only whether a limit was reached: it may quote the grammar."""
        return NO_TOKEN if "NoExtensionBias" in matcher.get_error() else LIMIT

    def _fail(self, failure: Failure) -> None:
        self.failure, self.ready = failure, True

    def _fault(self, error: BaseException) -> None:
        log.error("a structure failed with %s", type(error).__name__)
        self._fail(LIMIT)
