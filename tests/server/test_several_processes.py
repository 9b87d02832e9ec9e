"""A server process with two engine processes: a drain."""

from __future__ import annotations

import signal
from pathlib import Path

import grpc
from loraplex.v1 import generation_pb2_grpc
from rpc.harness import ask, expected, streamed
from server.test_process import SLOW, children, is_alive, serving

TWO = {"devices": "cpu,cpu", "engine_options": SLOW}


def test_sigterm_lets_the_streams_of_both_engines_finish(tmp_path: Path) -> None:
    with serving(tmp_path, **TWO) as up, grpc.insecure_channel(up.grpc) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        streams = [stub.GenerateStream(streamed(ask(30 + i, new=100))) for i in range(4)]
        for stream in streams:
            next(stream)
        engines = children(up.process.pid)
        assert len(engines) == 2
        up.process.send_signal(signal.SIGTERM)
        for i, stream in enumerate(streams):
            tokens = [token for event in stream for token in event.delta.token_ids]
            assert tokens == expected([30 + i], 100)
        assert up.wait() == 0
        assert not any(map(is_alive, engines))
