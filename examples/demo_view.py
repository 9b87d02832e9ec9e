"""Shows growing answers side by side on a terminal, elsewhere each answer when it is complete."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text


class SideBySide:
    """A context manager. Shows a growing column per answer; without a TTY, one line per answer."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._texts = dict.fromkeys(names, "")
        self._live = Live(
            self._render(), console=console, refresh_per_second=15, auto_refresh=console.is_terminal
        )

    def add(self, name: str, text: str) -> None:
        """Appends text to an answer."""
        self._texts[name] += text
        if self._console.is_terminal:
            self._live.update(self._render())

    def done(self, name: str) -> None:
        """Marks the answer as complete."""
        if not self._console.is_terminal:
            line = " ".join(self._texts[name].split())
            self._console.print(
                f"  {name:<7} {line}", markup=False, highlight=False, soft_wrap=True
            )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def _render(self) -> Columns:
        width = max(24, self._console.width // max(1, len(self._texts)) - 2)
        return Columns(
            [
                Panel(Text(text or "..."), title=name, width=width, title_align="left")
                for name, text in self._texts.items()
            ]
        )
