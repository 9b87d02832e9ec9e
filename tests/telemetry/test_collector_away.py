"""A collector that is away, hangs or refuses costs spans: no call, no start and no end waits."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex import Client
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

from deploy import live


@contextmanager
def refusing() -> Iterator[str]:
    """Nobody listens there."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def silent() -> Iterator[str]:
    """Connections are accepted, and nothing follows."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


class _Refusing(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(self, request: Any, context: Any) -> Any:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")


@contextmanager
def denying() -> Iterator[str]:
    """A collector that wants a token."""
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(_Refusing(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop(0).wait()


@contextmanager
def speaking_tls() -> Iterator[str]:
    """An https URL of a server that does not speak TLS."""
    with denying() as url:
        yield url.replace("http:", "https:")


@pytest.mark.parametrize("collector", [refusing, silent, denying, speaking_tls])
def test_calls_and_the_end_do_not_wait_for_it(
    collector: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "32")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    (tmp_path / "import").mkdir()
    with (
        collector() as endpoint,
        live.server(tmp_path, otlp_endpoint=endpoint) as server,
        Client(server.target, timeout=30.0) as client,
    ):

        def failed() -> bool:
            # Far more spans than the queue holds.
            for _ in range(20):
                assert client.generate("the", max_new_tokens=2, temperature=0.0).token_ids
            return sample(server.admin, 'loraplex_trace_spans_total{result="failed"}') > 0

        live.wait_for(failed, 60)
        assert sample(server.admin, 'loraplex_trace_spans_total{result="exported"}') == 0
    # `live.server` has checked that the server ended with exit code 0.
    log = (tmp_path / "server.log").read_text()
    assert log.count("spans cannot be exported to") == 1, log


def sample(admin: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[-1])
