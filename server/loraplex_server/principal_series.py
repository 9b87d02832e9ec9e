"""The series of principals: their requests, tokens and refusals, and the limits beside them.

Only names of the operator's file become labels, at most `MOST_LABELS` of them; others share
`_other`. A principal that is removed from the file takes its series with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Final

from loraplex_server.access.principals import Principal, PrincipalLimits
from loraplex_server.name_labels import NameLabels
from loraplex_server.series import Series

MOST_LABELS: Final = 200

LIMITS: Final = tuple(field.name for field in fields(PrincipalLimits))
"""Names of the limits, which are labels."""


class PrincipalSeries:
    """Writes the series of principals. Callers that are not identified, "", have none."""

    def __init__(self, series: Series, most: int = MOST_LABELS) -> None:
        self._series = series
        self._labels = NameLabels(most)

    def follow(self, principals: Mapping[str, Principal]) -> None:
        """Takes in the principals that there are now, by name, and their limits."""
        for name in self._labels.registered - principals.keys():
            if self._labels.remove(name):
                self._remove(name)
        for name, principal in principals.items():
            self._labels.add(name)
            label = self._labels.label(name)
            if label != name:
                continue
            for limit in LIMITS:
                value = getattr(principal.limits, limit)
                gauges = self._series.principal_limit
                if value is not None:
                    gauges.labels(label, limit).set(value)
                else:
                    gauges.remove_by_labels({"principal": label, "limit": limit})

    @contextmanager
    def active(self, name: str, requests: int = 1) -> Iterator[None]:
        """Counts generations of a principal as active within the context."""
        if not name:
            yield
            return
        # The gauge may outlive its series, if the principal is removed meanwhile.
        gauge = self._series.principal_active_requests.labels(self._labels.label(name))
        gauge.inc(requests)
        try:
            yield
        finally:
            gauge.dec(requests)

    def ended(self, name: str, code: str, requests: int = 1) -> None:
        """Counts generations of a principal that ended, or were refused, with a gRPC code."""
        if name:
            self._series.principal_requests.labels(self._labels.label(name), code).inc(requests)

    def used(self, name: str, kind: str, tokens: int) -> None:
        """Counts tokens: "prompt" or "completion"."""
        if name and tokens:
            self._series.principal_tokens.labels(self._labels.label(name), kind).inc(tokens)

    def quota_refused(self, principal: str, limit: str) -> None:
        """Counts a call that was refused for a limit, by its name."""
        self._series.quota_refusals.labels(self._labels.label(principal), limit).inc()

    def _remove(self, name: str) -> None:
        for family in (
            self._series.principal_requests,
            self._series.principal_tokens,
            self._series.principal_active_requests,
            self._series.principal_limit,
            self._series.quota_refusals,
        ):
            family.remove_by_labels({"principal": name})
