"""What each account holds of the places and of the blocks, and what it leaves to others.

These rules apply while several accounts send requests. None of them can wait for long because
another one has filled the engine:

    an account starts nothing       beyond half of the places, or beyond an eighth of them if only
                                    an eighth is free; likewise beyond an eighth of the blocks
    if there is no free place       the first request of a light account displaces the last one of
                                    an account that holds more than half
    a weight above that of others   makes that half larger: w / (w + the smallest of their weights)
    if a light account's prompt     every other step leaves out the rows of heavy accounts and has
    is to be computed               half of the budget for it: it is nearly as fast as alone

    if nothing decodes, and most    a step has a quarter of the budget, so that whoever comes need
    requests are one account's      not wait for a whole one

An account is light while it holds at most an eighth of the places, else heavy. All accounts of an
identified principal count as one, `Account.top`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import ceil

from loraplex_server.engine.batching.fair_queue import Account
from loraplex_server.engine.batching.request import Request

RESERVED = 8
"""One in so many places and blocks is for accounts that hold few."""

PROMPT_PARTS = 4
"""Steps into which a budget of prompt tokens is divided, as described above."""


class Shares:
    """The places and blocks of accounts at one moment, kept up to date by `note_start`."""

    def __init__(
        self, running: Iterable[Request], most_places: int, most_blocks: int, least_weight: float
    ) -> None:
        """`least_weight` is the smallest weight of the accounts that send requests."""
        self._least_weight = least_weight
        self._most_places = most_places
        self._few_places = most_places // RESERVED
        self._few_blocks = most_blocks // RESERVED
        self._places: Counter[Account] = Counter()
        self._blocks: Counter[Account] = Counter()
        for request in running:
            self.note_start(request)

    def note_start(self, request: Request) -> None:
        """Counts a running request."""
        if request.account is not None:
            top = request.account.top
            self._places[top] += 1
            self._blocks[top] += len(request.blocks)

    def is_light(self, account: Account | None) -> bool:
        """As described above."""
        return account is not None and self._places[account.top] <= max(1, self._few_places)

    @property
    def heavy(self) -> set[Account]:
        """As described above."""
        return {account for account in self._places if not self.is_light(account)}

    @property
    def heaviest(self) -> Account | None:
        """The account with more than half of the places, if there is one."""
        for account, count in self._places.items():
            if count > self._half(account):
                return account
        return None

    def has_majority(self, prompts: Iterable[Request], waiting: Iterable[Account]) -> bool:
        """Whether more than half of all requests are one account's, of those with work to do."""
        accounts = {each.account.top for each in prompts if each.account is not None}.union(waiting)
        counts = [account.open for account in accounts]
        return 2 * max(counts, default=0) > sum(counts)

    def barred(self, free_places: int, free_blocks: int) -> set[Account]:
        """The accounts that start nothing now."""
        few_places = free_places <= self._few_places
        few_blocks = free_blocks < self._few_blocks
        return {
            account
            for account, count in self._places.items()
            if count >= self._half(account)
            or (few_places and count > max(1, self._few_places))
            or (few_blocks and self._blocks[account] > self._few_blocks)
        }

    def _half(self, account: Account) -> int:
        weight = account.weight
        return ceil(self._most_places * weight / (weight + min(weight, self._least_weight)))
