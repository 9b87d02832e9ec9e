"""The structured output of all requests of an engine."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loraplex_model.checkpoints.tokenizer import TOKENIZER

from loraplex_server.engine.messages import Failure, ModelInfo, Structure
from loraplex_server.engine.structures.constraint import Constraint
from loraplex_server.engine.structures.library import new_matcher, read_tokenizer
from loraplex_server.engine.structures.numerals import NumeralGuard, TokenSpellings
from loraplex_server.engine.structures.workers import Job, Workers

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

THREADS = 2
KEPT_MATCHERS = 32
"""Grammars whose matcher is kept for later requests with the same one."""


class Structures:
    """Makes the constraints of requests. Reads the tokenizer when the first one is made.

    Requests with the same grammar get copies of one matcher, which share what its lexer has
    computed and nothing of their texts.
    """

    def __init__(self, info: ModelInfo, threads: int = THREADS) -> None:
        """Without threads, everything is computed where it is asked for."""
        self._info = info
        self._workers = Workers(threads)
        self._words = -(-info.base.config.vocab_size // 32)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._spellings: TokenSpellings | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._seconds: deque[float] = deque(maxlen=4096)
        self._due: list[Job] = []

    def constrain(self, structure: Structure) -> Constraint:
        """The constraint of a new request, whose first mask is being computed."""
        constraint = Constraint(
            self._words,
            self._info.eos_token_ids,
            structure.end_token_ids,
            self._seconds.append,
        )
        self._workers.run(partial(self._start, constraint, structure))
        return constraint

    def advance(
        self, constraint: Constraint, structure: Structure, token: int, is_last: bool = False
    ) -> tuple[bool, Failure | None]:
        """Notes a chosen token; returns whether the text is complete, and why it cannot go on.

        The next mask, unless there is none or `is_last`, is computed after `refill`. A failure of
        that is in the constraint once it is ready.
        """
        is_complete = constraint.advance(token)
        failure = constraint.failure
        if failure is not None:
            self._forget(structure)
        elif not (is_complete or is_last):
            self._due.append(partial(self._refill, constraint, structure))
        return is_complete, failure

    def refill(self) -> None:
        """Starts the computation of the masks that are out of date."""
        for job in self._due:
            self._workers.run(job)
        self._due.clear()

    def wait(
        self,
        constraints: Collection[Constraint],
        seconds: float,
        enough: Callable[[list[bool]], bool] = all,
    ) -> None:
        """Waits until all, or any, of the constraints are ready, or until time is up."""
        self.refill()
        self._workers.wait(lambda: enough([each.ready for each in constraints]), seconds)

    def take_seconds(self) -> list[float]:
        """Durations of the masks that were computed since the last call."""
        seconds = self._seconds
        return [seconds.popleft() for _ in range(len(seconds))]

    # in a worker

    def _start(self, constraint: Constraint, structure: Structure) -> None:
        def build() -> tuple[LLMatcher, NumeralGuard | None]:
            guard = NumeralGuard(self._all_spellings()) if structure.is_json else None
            return self._matcher(structure), guard

        constraint.start(build)
        if constraint.failure is not None:
            self._forget(structure)

    def _refill(self, constraint: Constraint, structure: Structure) -> None:
        constraint.refill()
        if constraint.failure is not None:
            self._forget(structure)

    def _forget(self, structure: Structure) -> None:
        """Lets the next request build its matcher: the copies share the bound on lexer states."""
        with self._lock:
            self._kept.pop(structure.grammar, None)

    def _matcher(self, structure: Structure) -> LLMatcher:
        """A matcher of its own for a request."""
        grammar = structure.grammar
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
                return kept.deep_copy()
        made = new_matcher(self._all_tokens(), grammar, structure.is_json)
        if not made.is_error():
            with self._lock:
                self._kept[grammar] = made.deep_copy()
                while len(self._kept) > KEPT_MATCHERS:
                    self._kept.popitem(last=False)
        return made

    def _all_tokens(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                path = Path(self._info.tokenizer_path) / TOKENIZER
                vocab_size = self._info.base.config.vocab_size
                ends = self._info.eos_token_ids
                self._tokenizer = read_tokenizer(path, vocab_size, ends)
            return self._tokenizer

    def _all_spellings(self) -> TokenSpellings:
        tokenizer = self._all_tokens()
        with self._lock:
            if self._spellings is None:
                tokens = [
                    b"" if tokenizer.is_special_token(token) else tokenizer.decode_bytes([token])
                    for token in range(tokenizer.vocab_size)
                ]
                self._spellings = TokenSpellings(tokens, self._words)
            return self._spellings
