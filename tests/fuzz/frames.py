"""HTTP/2 frames of hostile clients: wrong headers, broken order, floods. Bytes only, no sockets."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS, PADDED, PRIORITISED = 1, 4, 8, 32

Headers = list[tuple[bytes, bytes]]

TIMEOUTS = (
    *(b"99999999H", b"0n", b"1n", b"999999999S", b"-1S", b"1", b"S", b"", b"1e9S", b"1.5S"),
    *(b" 1S", b"1S ", b"1H1M", b"\xff", b"18446744073709551616H", b"0H", b"1u", b"00000001S"),
)
TYPES = (
    *(b"application/grpc", b"application/grpc+proto", b"application/grpc+json", b"text/html"),
    *(b"application/grpc-web", b"", b"application/grpcx", b"APPLICATION/GRPC", b"a" * 5000, b"\0"),
)
ENCODINGS = (b"identity", b"gzip", b"deflate", b"zstd", b"", b"gzip, gzip", b"\xff\xfe", b"x" * 999)
PATHS = (
    *(b"/", b"", b"*", b"/loraplex.v1.GenerationService/", b"/loraplex.v1.GenerationService/None"),
    *(b"loraplex.v1.GenerationService/Generate", b"//Generate", b"/" + b"a" * 9000, b"/\xff/\0"),
)
VALUES = (
    *(b"", b"x", b"x" * 3000, b"\xff\xfe\xfd", b"\xc3\x28", b"a\0b", b"a\r\nb: c", b" ", b"%00%zz"),
    *(b"====", b"AAAA", b"A" * 20_000, b"\x80", b"AA=A"),
)
NAMES = (
    *(b"x", b"x-bin", b"grpc-trace-bin", b"grpc-status", b"grpc-message", b"x-request-id", b"te"),
    *(b"Upper", b"connection", b"host", b"content-length", b":unknown", b":path", b"", b"a b"),
    *(b"grpc-previous-rpc-attempts", b"user-agent", b"grpc-tags-bin", b"\xff", b"x" * 300),
    *(b"grpc-accept-encoding", b"grpc-status-details-bin", b"cookie", b"transfer-encoding"),
)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", length: int = -1) -> bytes:
    """One frame; `length` may lie about the payload."""
    size = len(payload) if length < 0 else length
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def packed(headers: Headers) -> bytes:
    """A header block of literals that use no table and no Huffman code (RFC 7541, 6.2.2)."""
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in headers)


def _text(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes([len(text)]) + text
    rest, data = len(text) - 127, bytes([127])
    while rest > 127:
        data += bytes([rest & 127 | 128])
        rest >>= 7
    return data + bytes([rest]) + text


def begun() -> bytes:
    """What a connection begins with."""
    return PREFACE + frame(SETTINGS, 0, 0)


def call(path: bytes) -> Headers:
    """The headers of a proper call."""
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
    ]


def message(data: bytes, compressed: int = 0, length: int = -1) -> bytes:
    """A gRPC message; `length` may lie."""
    return struct.pack(">BI", compressed, len(data) if length < 0 else length) + data


def hostile_call(stream: int, path: bytes, data: bytes, chance: random.Random) -> bytes:
    """A call with something wrong in its headers, its message or both."""
    headers = call(path)
    for _ in range(chance.randint(0, 3)):
        _spoil(headers, chance)
    body = message(data, chance.choice((0, 0, 0, 1, 255)), chance.choice((-1, -1, 0, 2**32 - 1)))
    opened = frame(HEADERS, END_HEADERS, stream, packed(headers)[: 1 << 14])
    return opened + frame(DATA, chance.choice((0, 1, 1, 1)), stream, body[: 1 << 14])


def _spoil(headers: Headers, chance: random.Random) -> None:
    kind = chance.randrange(7)
    if kind == 0:
        headers.append((b"grpc-timeout", chance.choice(TIMEOUTS)))
    elif kind == 1:
        headers[4] = (b"content-type", chance.choice(TYPES))
    elif kind == 2:
        headers.append((b"grpc-encoding", chance.choice(ENCODINGS)))
    elif kind == 3:
        headers[2] = (b":path", chance.choice(PATHS))
    elif kind == 4:
        headers[chance.randrange(len(headers))] = (chance.choice(NAMES), chance.choice(VALUES))
    else:
        at = chance.randrange(len(headers) + 1)
        headers[at:at] = [(chance.choice(NAMES), chance.choice(VALUES))] * chance.choice((1, 1, 30))


def garbage(chance: random.Random) -> bytes:
    """Frames that break the protocol, after a proper beginning or without one."""
    headers = packed(call(b"/grpc.health.v1.Health/Check"))
    kinds: Sequence[Callable[[], bytes]] = (
        lambda: chance.randbytes(chance.choice((1, 24, 500, 9000))),
        lambda: begun() + chance.randbytes(2000),
        lambda: begun() + b"".join(_any_frame(chance) for _ in range(50)),
        lambda: begun() + frame(SETTINGS, 0, 0, _settings(chance)) * 200,
        lambda: begun() + frame(PING, 0, 0, bytes(8)) * 500,
        lambda: begun() + frame(WINDOW, 0, 0, struct.pack(">I", 2**31 - 1)) * 3,
        lambda: begun() + frame(RST, 0, 1, bytes(4)) * 100,
        lambda: begun() + frame(PRIORITY, 0, 3, struct.pack(">IB", 3, 0)) * 300,
        lambda: begun() + frame(HEADERS, 0, 1, headers) + frame(CONTINUATION, 0, 1, headers) * 300,
        lambda: begun() + frame(HEADERS, END_HEADERS, 1, headers) + frame(DATA, PADDED, 1, b"\xff"),
        lambda: begun() + frame(HEADERS, END_HEADERS, 2, headers),
        lambda: begun() + frame(HEADERS, END_HEADERS, 1, b"\x3f\xff\xff\xff\xff\xff\xff" * 9),
        lambda: begun() + frame(HEADERS, END_HEADERS, 1, chance.randbytes(60)),
        lambda: begun() + frame(DATA, 0, 1, b"", 2**24 - 1),
        lambda: begun() + frame(GOAWAY, 0, 0, bytes(8)) * 20 + frame(PUSH, 4, 1, bytes(9)),
        lambda: b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 20,
        lambda: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(200),
    )
    return chance.choice(kinds)()


def _any_frame(chance: random.Random) -> bytes:
    payload = chance.randbytes(chance.choice((0, 1, 4, 5, 8, 60)))
    kind, flags = chance.choice((*range(10), 10, 255)), chance.getrandbits(8)
    stream = chance.choice((0, 0, 1, 1, 2, 3, 5, 2**31 - 1, 2**32 - 1))
    return frame(kind, flags, stream, payload)


def _settings(chance: random.Random) -> bytes:
    pairs = [(chance.randrange(12), chance.choice((0, 1, 2**14, 2**31, 2**32 - 1)))] * 5
    return b"".join(struct.pack(">HI", *pair) for pair in pairs)


def resets(first: int, count: int, headers: bytes) -> bytes:
    """Calls that are opened and taken back at once, on the streams from the odd number `first`."""
    taken_back = struct.pack(">I", 8)  # CANCEL
    return b"".join(
        frame(HEADERS, END_HEADERS, stream, headers) + frame(RST, 0, stream, taken_back)
        for stream in range(first, first + 2 * count, 2)
    )
