"""Adapters over HTTP: plain resources for the console, and the endpoints of other servers."""

from __future__ import annotations

from starlette.routing import BaseRoute

from loraplex_gateway.adapters import aliases, managing, others, reading
from loraplex_gateway.adapters.orders import AdapterOrders
from loraplex_gateway.context import Context

__all__ = ["routes"]


def routes(context: Context) -> list[BaseRoute]:
    """The routes; those that change adapters exist only if the settings say so."""
    orders = AdapterOrders(context)
    found = reading.routes(context)
    if context.settings.manages_adapters:
        found += aliases.routes(context)
        found += managing.routes(context, orders)
        found += others.routes(context, orders)
    return found
