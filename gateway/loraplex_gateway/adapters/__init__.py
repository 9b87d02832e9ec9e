"""Adapters over HTTP: plain resources for the console, and the endpoints of other servers."""

from __future__ import annotations

from starlette.routing import BaseRoute

from loraplex_gateway.adapters import aliases, managing, others, reading
from loraplex_gateway.adapters.arrivals import Arrivals
from loraplex_gateway.context import Context

__all__ = ["routes"]


def routes(context: Context) -> list[BaseRoute]:
    """The routes; those that change adapters exist only if the settings say so."""
    arrivals = Arrivals(context)
    found = reading.routes(context)
    if context.settings.manages_adapters:
        found += aliases.routes(context)
        found += managing.routes(context, arrivals)
        found += others.routes(context, arrivals)
    return found
