"""A hostile client, in a process of its own so that it does not delay the measuring process.

    python tests/rpc/hostile_client.py KIND ADDRESS SECONDS SEED

KIND is messages (wrong messages in proper calls), calls (wrong headers), garbage (no HTTP/2) or
resets (calls that are taken back at once). The last line of output is one JSON object: `sent`, and
the number of answers by status in `codes`.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import grpc
from fuzz import frames
from fuzz.messages import Method, hostile, methods, proper

CALL_SECONDS = (0.02, 0.1, 0.2)
ANSWERS = 20
PAUSE_SECONDS = 0.003
"""Time between two connections of garbage, so that it is their content that is tested."""
PIECE = 1 << 16
INTERNAL = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


def send_messages(address: str, end: float, chance: random.Random) -> tuple[int, Counter[str]]:
    """Calls all methods with hostile messages, many at a time."""
    codes: Counter[str] = Counter()
    sent, every = 0, methods()
    with grpc.insecure_channel(address) as channel:
        while time.monotonic() < end:
            drawn = [chance.choice(every) for _ in range(40)]
            calls = [(_begin(channel, method, chance), method) for method in drawn]
            for call, method in calls:
                codes[_outcome(call, method.sends_many)] += 1
            sent += len(calls)
    return sent, codes


def _begin(channel: grpc.Channel, method: Method, chance: random.Random) -> Any:
    made = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, False): channel.stream_unary,
        (True, True): channel.stream_stream,
    }[method.takes_many, method.sends_many]
    call: Any = made(method.path)
    data = [hostile(method, chance) for _ in range(chance.randint(0, 4))]
    request = iter(data) if method.takes_many else hostile(method, chance)
    seconds = chance.choice(CALL_SECONDS)
    metadata = (("x-bin", chance.randbytes(30)), ("x", "y" * chance.choice((1, 2000))))
    if method.sends_many:
        return call(request, timeout=seconds, metadata=metadata)
    return call.future(request, timeout=seconds, metadata=metadata)


def _outcome(call: Any, is_stream: bool) -> str:
    """Reads at most a few answers; returns the status, with the text of internal errors."""
    try:
        if is_stream:
            for _ in itertools.islice(call, ANSWERS):
                pass
            call.cancel()
        else:
            call.result()
    except grpc.RpcError as error:
        text = error.details() if error.code() in INTERNAL else ""
        return f"{error.code().name} {text}".strip()
    return "OK"


@contextmanager
def connected(address: str) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=1.0) as connection:
        yield connection


def _drain(connection: socket.socket, seconds: float) -> bool:
    """Reads what has come; returns whether the server still talks to us."""
    connection.settimeout(seconds)
    try:
        while data := connection.recv(PIECE):
            if len(data) < PIECE:
                return True
        return False
    except TimeoutError:
        return True


def send_calls(address: str, end: float, chance: random.Random) -> tuple[int, Counter[str]]:
    """Proper connections whose calls have wrong headers or messages."""
    sent, codes = 0, Counter[str]()
    every = methods()
    while time.monotonic() < end:
        with suppress(OSError), connected(address) as connection:
            codes["connections"] += 1
            connection.sendall(frames.begun())
            for stream in range(1, 100, 2):
                method = chance.choice(every)
                path, data = method.path, hostile(method, chance)
                if chance.random() < 0.3:
                    path, data = proper(chance)
                opened = frames.hostile_call(stream, path.encode(), data, chance)
                connection.sendall(opened)
                sent += 1
                if not _drain(connection, 0.005) or time.monotonic() > end:
                    break
    return sent, codes


def send_garbage(address: str, end: float, chance: random.Random) -> tuple[int, Counter[str]]:
    """Connections that break the protocol."""
    sent, codes = 0, Counter[str]()
    while time.monotonic() < end:
        with suppress(OSError), connected(address) as connection:
            codes["connections"] += 1
            connection.sendall(frames.garbage(chance))
            sent += 1
            _drain(connection, 0.005)
        time.sleep(PAUSE_SECONDS)
    return sent, codes


def send_resets(address: str, end: float, chance: random.Random) -> tuple[int, Counter[str]]:
    """As many calls as the connection takes, each of them taken back at once."""
    sent, codes = 0, Counter[str]()
    paths = (b"/loraplex.v1.GenerationService/Generate", b"/grpc.health.v1.Health/Check")
    headers = [frames.packed(frames.call(path)) for path in paths]
    while time.monotonic() < end:
        with suppress(OSError), connected(address) as connection:
            codes["connections"] += 1
            connection.sendall(frames.begun())
            first = 1
            while time.monotonic() < end and first < 2**30:
                connection.sendall(frames.resets(first, 200, chance.choice(headers)))
                first, sent = first + 400, sent + 200
                if not _drain(connection, 0.0001):
                    break
    return sent, codes


KINDS = {
    "messages": send_messages,
    "calls": send_calls,
    "garbage": send_garbage,
    "resets": send_resets,
}


if __name__ == "__main__":
    kind, address, seconds, seed = sys.argv[1:]
    end = time.monotonic() + float(seconds)
    sent, codes = KINDS[kind](address, end, random.Random(seed))
    print(json.dumps({"sent": sent, "codes": dict(codes)}))
