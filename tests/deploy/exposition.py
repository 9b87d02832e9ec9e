"""The names of the series that the server exports, taken from the code that exports them."""

from __future__ import annotations

import re

from loraplex_gateway.metrics import GatewayMetrics
from loraplex_gateway.places import CallPlaces
from loraplex_server.metrics import Metrics
from prometheus_client import CollectorRegistry

_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}
OTHER_WORDS = {
    "loraplex_gateway",
    "loraplex_server",
    "loraplex_model",
    "loraplex_training",
    "loraplex_base_fingerprint",
    "loraplex_task",
}
"""Words that look like a metric: packages (`loraplex_adapters` is both), keys of adapters."""

_NAME = re.compile(r"\bloraplex_[a-z_]+\b(?![-/])")


def families() -> dict[str, str]:
    """Each family as a query names it without histogram suffixes, and its type."""
    registry = CollectorRegistry()
    Metrics(registry)
    return {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in registry.collect()
    }


def gateway_families() -> dict[str, str]:
    """The same for the gateway."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): family.type
        for family in GatewayMetrics(CallPlaces(1)).registry.collect()
    }


def series_names() -> set[str]:
    """Every name that a query may use."""
    return server_series_names() | _names(GatewayMetrics(CallPlaces(1)).registry)


def server_series_names() -> set[str]:
    """The names that a scrape of the server has; the gateway's are at its own address."""
    registry = CollectorRegistry()
    Metrics(registry)
    return _names(registry)


def _names(registry: CollectorRegistry) -> set[str]:
    return {
        family.name + suffix for family in registry.collect() for suffix in _SUFFIXES[family.type]
    }


def mentioned(text: str) -> set[str]:
    """The metric names that a text mentions."""
    return set(_NAME.findall(text)) - OTHER_WORDS
