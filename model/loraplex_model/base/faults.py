"""Named points at which a test can make the program fail: raise, be killed, or wait.

A point stands before each step that a crash may separate from the one before it, and after the last
one. Without an action `reach` reads one global and returns; no setting and no variable of the
environment can install one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_action: Callable[[str], None] | None = None


def reach(point: str) -> None:
    """Does at `point` what a test has asked for; nothing otherwise.

    `point` is a literal, written at one place only: that is how a test finds them all.
    """
    action = _action
    if action is not None:
        action(point)


@contextmanager
def injected(action: Callable[[str], None]) -> Iterator[None]:
    """Calls `action` with the name of every point that is reached, in every thread, until it ends.

    For tests. What the action raises passes through the code that reached the point.
    """
    global _action
    before, _action = _action, action
    try:
        yield
    finally:
        _action = before
