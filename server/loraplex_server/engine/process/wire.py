"""Frames on the socket between the two processes: a 4-byte little-endian length, then msgpack."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import msgspec
from msgspec import structs

from loraplex_server.engine.messages import (
    FromEngine,
    Output,
    PromptScores,
    StepReport,
    ToEngine,
)

SCORES_IN_FRAME = 4096
"""Log-probabilities of a prompt in one frame, which the front decodes in some 2 ms."""

SOCKET_VARIABLE = "LORAPLEX_ENGINE_FD"
"""Environment variable with the descriptor number of the engine process's socket."""

DEVICE_VARIABLE = "LORAPLEX_ENGINE_DEVICE"
"""Environment variable with the name of an engine process's device, if there are several."""

MAX_FRAME = 256 << 20
"""Bytes of the largest frame."""

TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
"""Decoders of the two directions, for `decode`."""

_encoder = msgspec.msgpack.Encoder()

M = TypeVar("M")


class WireError(Exception):
    """The bytes on the socket are not a message. The connection is unusable."""


def encode(message: ToEngine | FromEngine) -> bytes:
    """The frames of a message: one, and others before it for what does not belong into one frame.

    Raises `WireError` if a frame is longer than `MAX_FRAME`.
    """
    if isinstance(message, StepReport) and any(map(_is_long, message.outputs)):
        return b"".join(_frame(part) for part in _parts(message))
    return _frame(message)


def _parts(report: StepReport) -> Iterator[FromEngine]:
    """A report whose long lists of log-probabilities are sent before it, piece by piece."""
    for output in filter(_is_long, report.outputs):
        scores = output.prompt_logprobs
        size = max(1, SCORES_IN_FRAME // (1 + len(scores[0].top)))
        for at in range(0, len(scores), size):
            yield PromptScores(output.id, scores[at : at + size])
    outputs = [
        structs.replace(output, prompt_logprobs=[]) if _is_long(output) else output
        for output in report.outputs
    ]
    yield structs.replace(report, outputs=outputs)


def _is_long(output: Output) -> bool:
    scores = output.prompt_logprobs
    return bool(scores) and len(scores) * (1 + len(scores[0].top)) > SCORES_IN_FRAME


def _frame(message: ToEngine | FromEngine) -> bytes:
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
