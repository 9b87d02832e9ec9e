"""Named points at which a test can make the program raise, be killed, or wait.

There is a point before each step that a crash may separate from the previous one, and one after the
last step. Without an action `reach` reads one global and returns; no setting and no environment
variable can install an action.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_action: Callable[[str], None] | None = None


def reach(point: str) -> None:
    """Runs the action that a test has installed, if there is one.

    `point` is a literal that occurs once in the source, so that a test can list all points.
    """
    action = _action
    if action is not None:
        action(point)


@contextmanager
def injected(action: Callable[[str], None]) -> Iterator[None]:
    """For tests: within the context, calls `action` with the name of every point reached.

    This holds for all threads. Exceptions of the action propagate from the point.
    """
    global _action
    before, _action = _action, action
    try:
        yield
    finally:
        _action = before
