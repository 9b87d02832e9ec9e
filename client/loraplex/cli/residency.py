"""`loraplex adapters load`, `unload`, `pin`, `merge`, `watch`: adapters on the device."""

from __future__ import annotations

import sys
from typing import Annotated

from loraplex.cli import options, output
from loraplex.cli.command import command
from loraplex.cli.options import option
from loraplex.cli.session import Session
from loraplex.results import AdapterTable


@command()
def load(session: Session, adapter_id: options.AdapterId) -> None:
    """Load an adapter onto the device and wait until it is resident."""
    session.show(session.client.load_adapter(adapter_id), output.write_residency)


@command()
def unload(
    session: Session,
    adapter_id: options.AdapterId,
    force: Annotated[
        bool, option("Running requests", "Abort the requests that use the adapter.", "--force")
    ] = False,
    drain: Annotated[
        float | None,
        option(
            "Running requests",
            "Abort the requests that still run after this time.",
            min=0,
            metavar="SECONDS",
        ),
    ] = None,
) -> None:
    """Remove an adapter from the device once its running requests have finished."""
    found = session.client.unload_adapter(adapter_id, force=force, drain=drain)
    session.show(found, output.write_residency)


@command()
def pin(session: Session, adapter_id: options.AdapterId) -> None:
    """Load an adapter onto the device and keep it there."""
    session.show(session.client.pin_adapter(adapter_id), output.write_residency)


@command()
def unpin(session: Session, adapter_id: options.AdapterId) -> None:
    """Allow a pinned adapter to be evicted again."""
    session.show(session.client.unpin_adapter(adapter_id), output.write_residency)


@command()
def merge(session: Session, adapter_id: options.AdapterId) -> None:
    """Compute an adapter's requests with dense merged weights; other requests are unaffected."""
    session.show(session.client.merge_adapter(adapter_id), output.write_residency)


@command()
def unmerge(session: Session, adapter_id: options.AdapterId) -> None:
    """Drop an adapter's merged weights."""
    session.show(session.client.unmerge_adapter(adapter_id), output.write_residency)


@command(timeout=None)
def watch(session: Session) -> None:
    """Print the adapters, then one line for every change, until Ctrl-C."""
    with session.client.watch_adapters() as changes:
        for item in changes:
            if session.as_json:
                kind = "table" if isinstance(item, AdapterTable) else "event"
                output.write_json({kind: item}, flush=True)
            elif isinstance(item, AdapterTable):
                if item.resync:
                    output.note("some changes were missed; this is the current table")
                output.write_adapters(item.adapters)
                sys.stdout.flush()
            else:
                output.write_event(item)
