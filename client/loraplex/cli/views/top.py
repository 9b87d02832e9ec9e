"""`loraplex top`: the batch of the engine, live on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from loraplex.cli import output
from loraplex.cli.options import option
from loraplex.cli.session import Session
from loraplex.views.engine import AdapterRows, EngineState, EngineWatch

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

HIDDEN, BASE = "(others)", "(base)"
"""Names of the entries that no adapter's id stands for."""

TITLES = ("adapter", "prefill", "decode", "waiting")


def top(
    session: Session,
    interval: Annotated[
        float,
        option("Output", "Time between two states.", min=0.1, max=60.0, metavar="SECONDS"),
    ] = 0.5,
    once: Annotated[bool, option("Output", "Print one state and exit.", "--once")] = False,
) -> None:
    """Show which adapters the engine computes, a few times a second. Ctrl-C ends it.

    Elsewhere than on a terminal, and with --json, a line is printed for each entry or state.
    """
    with session.client.watch_engine(interval) as watch:
        if session.as_json:
            for state in _states(watch, once):
                output.write_json(state, flush=True)
        elif once or not sys.stdout.isatty():
            for state in _states(watch, once):
                write_state(state)
        else:
            _live(watch)


def _states(watch: EngineWatch, once: bool) -> Iterator[EngineState]:
    for state in watch:
        yield state
        if once:
            return


def _live(watch: EngineWatch) -> None:
    """Draws each state in place of the one before, and leaves the last one."""
    from rich.live import Live

    before: EngineState | None = None
    with Live(auto_refresh=False) as live:
        for state in watch:
            live.update(drawn(state, before), refresh=True)
            before = state


def write_state(state: EngineState) -> None:
    """Prints tab-separated lines: the figures, then an entry for each adapter."""
    figures = [f"{name}={value}" for name, value in _figures(state)]
    print(output.plain(state.time), *figures, sep="\t")
    for entry in state.adapters:
        print(name_of(entry), entry.prefill, entry.decode, entry.waiting, sep="\t", flush=True)


def drawn(state: EngineState, before: EngineState | None) -> Group:
    """The state as it is shown on a terminal; rates are those since the state `before`."""
    from rich.console import Group
    from rich.text import Text

    rates = "" if before is None else _rates(state, before)
    return Group(Text(summary(state) + rates, style="dim"), _table(state))


def summary(state: EngineState) -> str:
    """The figures of a state, in two lines."""
    running = sum(entry.running for entry in state.adapters)
    waiting = sum(entry.waiting for entry in state.adapters)
    return (
        f"rows {running}/{state.max_rows}, waiting {waiting}, steps {state.steps}\n"
        f"KV blocks {state.kv_blocks_used}/{state.kv_blocks} (+{state.kv_blocks_cached} cached), "
        f"adapters {state.resident_adapters}, {output.size(state.adapter_bytes)} of "
        f"{output.size(state.adapter_bytes_limit)}"
    )


def name_of(entry: AdapterRows) -> str:
    """The entry's adapter, or what stands for it."""
    return HIDDEN if entry.hidden else entry.adapter_id or BASE


def _rates(state: EngineState, before: EngineState) -> str:
    """Tokens a second between two states; "" if the engine was restarted between them."""
    seconds = (state.time - before.time).total_seconds()
    generated = state.generated_tokens - before.generated_tokens
    prompt = state.prompt_tokens - before.prompt_tokens
    if seconds <= 0 or generated < 0 or prompt < 0:
        return ""
    return f"\ntokens/s {generated / seconds:.0f} generated, {prompt / seconds:.0f} of prompts"


def _table(state: EngineState) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for title in TITLES:
        table.add_column(title, justify="left" if title == TITLES[0] else "right")
    table.add_column("")
    most = max((entry.running + entry.waiting for entry in state.adapters), default=1)
    for entry in state.adapters:
        bar = Text()
        for count, style in (
            (entry.decode, "green"),
            (entry.prefill, "yellow"),
            (entry.waiting, "dim"),
        ):
            bar.append("#" * -(-30 * count // max(most, 30)), style)
        counts = (str(each) for each in (entry.prefill, entry.decode, entry.waiting))
        table.add_row(Text(name_of(entry)), *counts, bar)
    return table


def _figures(state: EngineState) -> Iterator[tuple[str, int]]:
    for name in EngineState.__dataclass_fields__:
        value = getattr(state, name)
        if isinstance(value, int):
            yield name, value
