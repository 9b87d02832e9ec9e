"""Counts the generations of principals, however they end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from loraplex_model.base.refusal import Refusal

from loraplex_server.principal_series import PrincipalSeries
from loraplex_server.rpc.calls.errors import TABLE


@contextmanager
def counted(
    series: PrincipalSeries, principal: str, deadline: float | None, requests: int = 1
) -> Iterator[None]:
    """Counts a call's generations as active within the context, and its gRPC code at the end.

    `deadline` is that of the call, in seconds of `time.monotonic()`.
    """
    code = grpc.StatusCode.CANCELLED
    try:
        with series.active(principal, requests):
            yield
        code = grpc.StatusCode.OK
    except Refusal as error:
        row = TABLE.get(error.reason)
        code = row.code if row is not None else grpc.StatusCode.INTERNAL
        raise
    except asyncio.CancelledError:
        if deadline is not None and time.monotonic() >= deadline:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
        raise
    except Exception:
        code = grpc.StatusCode.INTERNAL
        raise
    finally:
        series.ended(principal, code.name, requests)
