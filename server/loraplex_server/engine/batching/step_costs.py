"""What steps cost, as measured, and how many tokens of prompts a step has time for.

While rows decode, every prompt token of a step delays their next tokens. So a step may take
`ratio` times as long as one that only decodes, and gets as many prompt tokens as fit:

    | decode rows | prompt tokens          |
    |<-- d(n) --->|<- at most (ratio-1) d ->|

`d(n)`, the time of a step with `n` decode rows alone, and the time of a prompt token are averages
of recent steps. A step has no prompt tokens if d is not known, and one after `PROBE_EVERY` steps
with some, so that d is known for the present rows. When nothing decodes, the whole budget is used.
How prompts are cut changes no result.
"""

from __future__ import annotations

NEW_COST = 2
"""Cost of a generated token, where a token of a prompt costs 1."""

FLOOR = 16
"""Prompt tokens that a step may always have."""

STRETCH_STEPS = 64
"""Steps over which the part of prompts in steps with decode rows is taken."""

PROBE_EVERY = 48
"""Steps with decode rows and prompt tokens after which one has decode rows only."""

_PACE = 0.3
"""Weight of a new measurement in an average."""

_MOST = 2.0
"""A measurement counts as at most so many times the average, since a pause is not a cost."""


class StepCosts:
    """Averages of recent steps.

    Attributes:
        token_seconds: time that a token of a prompt adds to a step; 0 if unknown.
        step_seconds: duration of steps with decode rows; 0 if unknown.
    """

    def __init__(self, ratio: float) -> None:
        """`ratio` is described above; 0 sets no limit."""
        self._ratio = ratio
        self._decode: dict[int, float] = {}
        self._mixed = 0
        self._stretch = RecentRate(1, STRETCH_STEPS)
        self.token_seconds = 0.0
        self.step_seconds = 0.0

    def note(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """Notes a step of `decodes` decode rows and some prompt tokens."""
        if seconds <= 0.0:
            return
        alone = self.decode_seconds(decodes) if decodes else 0.0
        if decodes:
            self.step_seconds = _average(self.step_seconds, seconds)
            if alone:
                self._stretch.note(seconds, alone)
        if not prompt_tokens:
            self._note_decode(decodes, seconds)
            return
        self._mixed += bool(decodes)
        if alone or not decodes:
            each = max(seconds - alone, 0.0) / prompt_tokens
            # A step that took less than its decode rows alone do tells nothing but "cheap".
            each = max(each, self.token_seconds / _MOST)
            if each:
                self.token_seconds = _average(self.token_seconds, each)

    def _note_decode(self, rows: int, seconds: float) -> None:
        """Notes a step of decode rows alone."""
        if self._decode and rows not in self._decode:
            nearest = self._nearest(rows)
            grown = self._decode[nearest] * max(1.0, rows / nearest)
            self._decode[rows] = min(seconds, _MOST * grown)  # as in `_average`
        else:
            self._decode[rows] = _average(self._decode.get(rows, 0.0), seconds)

    def _nearest(self, rows: int) -> int:
        return min(self._decode, key=lambda each: abs(each - rows))

    def decode_seconds(self, rows: int) -> float:
        """Duration of a step with `rows` decode rows alone; 0 if no such step is known.

        It is that of the nearest number of rows that was measured.
        """
        known = self._decode.get(rows)
        if known is None:
            if not self._decode:
                return 0.0
            known = self._decode[self._nearest(rows)]
        return known

    def expected(self) -> tuple[float, float]:
        """Duration of a step with the usual part of prompts: without decode rows, and more per row.

        It is taken from the fewest and the most rows that were measured alone.
        """
        if not self._decode:
            return self.step_seconds, 0.0
        least, most = min(self._decode), max(self._decode)
        slope = max(0.0, self._decode[most] - self._decode[least]) / max(1, most - least)
        stretch = max(1.0, self._stretch.value)
        return stretch * (self._decode[most] - slope * most), stretch * slope

    def allowance(self, rows: int, most: int) -> int:
        """Number of prompt tokens, at most `most`, for a step with `rows` decode rows."""
        if not (rows and self._ratio and self.token_seconds):
            return most
        alone = self.decode_seconds(rows)
        if not alone or self._mixed >= PROBE_EVERY:
            self._mixed = 0
            return 0
        return min(most, max(FLOOR, int((self._ratio - 1.0) * alone / self.token_seconds)))


class WorkRates:
    """How fast waiting requests get their turn, by what recent steps have done.

    Attributes:
        prompt_rate: prompt tokens per second, of steps that had any; 0 if unknown.
        work_rate: cost of the tokens per second, of steps that left requests waiting; 0 if unknown.
            Costs are those of `FairQueue`. While as many requests end as start, requests of this
            cost start per second.
    """

    def __init__(self) -> None:
        self._prompt = RecentRate(4)
        self._work = RecentRate(16)
        self._full = 1.0  # share of answers as long as they may be
        self._early = 0.0  # tokens of the others; 0 if unknown

    @property
    def prompt_rate(self) -> float:
        return self._prompt.value

    @property
    def work_rate(self) -> float:
        return self._work.value

    def note(self, decodes: int, prompt_tokens: int, seconds: float, is_busy: bool) -> None:
        """Notes a step, and whether it left requests waiting."""
        if seconds <= 0.0:
            return
        if prompt_tokens:
            self._prompt.note(prompt_tokens, seconds)
        if is_busy:
            self._work.note(NEW_COST * decodes + prompt_tokens, seconds)

    def note_answer(self, tokens: int, most: int) -> None:
        """Notes the length of an answer that may have had `most` tokens."""
        self._full += 0.05 * ((tokens >= most) - self._full)
        if tokens < most:
            self._early += (tokens - self._early) * (0.1 if self._early else 1.0)

    def new_tokens(self, most: int) -> float:
        """The length to expect of an answer that may have `most` tokens."""
        early = min(float(most), self._early or most)
        return max(1.0, self._full * most + (1.0 - self._full) * early)


class RecentRate:
    """An amount over the seconds that it took; a step counts less the longer it is ago."""

    __slots__ = ("_amount", "_keep", "_left", "_seconds")

    def __init__(self, least: int, steps: int = 32) -> None:
        """The rate is 0 before `least` steps; `steps` is about how many it is taken over."""
        self._left = least
        self._keep = 1.0 - 1.0 / steps
        self._amount = 0.0
        self._seconds = 0.0

    def note(self, amount: float, seconds: float) -> None:
        """Notes a step."""
        self._left -= self._left > 0
        self._amount = self._keep * self._amount + amount
        self._seconds = self._keep * self._seconds + seconds

    @property
    def value(self) -> float:
        """The amount per second; 0 if it is not known."""
        return 0.0 if self._left or not self._seconds else self._amount / self._seconds


def _average(average: float, seconds: float) -> float:
    if not average:
        return seconds
    return average + _PACE * (min(seconds, _MOST * average) - average)
