"""Frames on the socket between the two processes: a 4-byte little-endian length, then msgpack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec

from loraplex_server.engine.messages import FromEngine, ToEngine

SOCKET_VARIABLE = "LORAPLEX_ENGINE_FD"
"""Environment variable with the descriptor number of the engine process's socket."""

MAX_FRAME = 256 << 20
"""Bytes of the largest frame; prompt log-probabilities of a long prompt stay below it."""

TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
"""Decoders of the two directions, for `decode`."""

_encoder = msgspec.msgpack.Encoder()

M = TypeVar("M")


class WireError(Exception):
    """The bytes on the socket are not a message. The connection is unusable."""


def encode(message: ToEngine | FromEngine) -> bytes:
    """The frame of a message. Raises `WireError` if it is longer than `MAX_FRAME`."""
    frame = bytearray(4)
    _encoder.encode_into(message, frame, 4)
    length = len(frame) - 4
    if length > MAX_FRAME:
        raise WireError(f"a message of {length} bytes is longer than {MAX_FRAME}")
    frame[:4] = length.to_bytes(4, "little")
    return bytes(frame)


def decode(payload: bytes, decoder: msgspec.msgpack.Decoder[M]) -> M:
    """The message in a frame's payload. Raises `WireError`."""
    try:
        return decoder.decode(payload)
    except (msgspec.MsgspecError, ValueError) as error:
        raise WireError(str(error)) from None


class Frames:
    """Cuts a stream of bytes into payloads."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yields every payload that `data` completes. Raises `WireError` for an oversized one."""
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= 4:
            length = int.from_bytes(buffer[at : at + 4], "little")
            if length > MAX_FRAME:
                raise WireError(f"a frame of {length} bytes is longer than {MAX_FRAME}")
            if len(buffer) - at < 4 + length:
                break
            yield bytes(buffer[at + 4 : at + 4 + length])
            at += 4 + length
        del buffer[:at]
