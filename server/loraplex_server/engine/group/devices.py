"""The devices of a server: the setting `devices`, and what an engine process sees of its device.

devices      engine    CUDA_VISIBLE_DEVICES here   of the process    the process computes on
0,2          cuda:0    not set                     0                 cuda:0
             cuda:2                                2                 cuda:0
0,1          cuda:0    GPU-aa,GPU-bb               GPU-aa            cuda:0
             cuda:1                                GPU-bb            cuda:0
cpu,cpu      cpu:0     any                         unchanged         cpu
             cpu:1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from loraplex_model.base.refusal import Reason, Refusal

from loraplex_server.engine.process import wire

MAX_ENGINES: Final = 16

VISIBLE: Final = "CUDA_VISIBLE_DEVICES"
"""Environment variable by which CUDA chooses and numbers the GPUs that a process sees."""


@dataclass(frozen=True, slots=True)
class EnginePlacement:
    """Where one of several engines computes.

    Attributes:
        kind: kind of the device, which is also the device's name within the process.
        number: CUDA's number of the GPU in the front process; for a CPU that of the engine.
    """

    kind: Literal["cpu", "cuda"]
    number: int

    @property
    def name(self) -> str:
        """Name in metrics, logs and messages, such as `cuda:1`; different for each engine."""
        return f"{self.kind}:{self.number}"

    def environment(self, outer: Mapping[str, str]) -> dict[str, str]:
        """Variables for the engine process, which then sees its own GPU only.

        `outer` is the environment of the front process. Raises Refusal if that hides the GPU.
        """
        variables = {wire.DEVICE_VARIABLE: self.name}
        if self.kind == "cpu":
            return variables
        visible = _visible(outer)
        if visible is None:
            return {**variables, VISIBLE: str(self.number)}
        if self.number >= len(visible):
            text = f"there is no {self.name}: {VISIBLE} is {outer[VISIBLE]!r}, {len(visible)} GPUs"
            raise Refusal(Reason.NO_CUDA, text)
        return {**variables, VISIBLE: visible[self.number]}


def parse(text: str) -> list[EnginePlacement]:
    """The placements that the setting `devices` names; none if it is empty.

    Raises ValueError with one line that says what is wrong.
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    found: list[EnginePlacement] = []
    for word in words:
        number = word.removeprefix("cuda:")
        if word == "cpu":
            placement = EnginePlacement("cpu", len(found))
        elif number.isascii() and number.isdecimal() and len(number) < 5:
            placement = EnginePlacement("cuda", int(number))
        else:
            raise ValueError(
                f"{word!r} is no device; give numbers of GPUs such as 0,1 or cuda:0,cuda:1, or cpu "
                "once for each engine"
            )
        if placement in found:
            raise ValueError(f"{placement.name} is named twice; a GPU has one engine")
        found.append(placement)
    if len({placement.kind for placement in found}) > 1:
        raise ValueError(
            f"{text!r} mixes CPU and GPU, whose answers differ by rounding; use one server for each"
        )
    if len(found) > MAX_ENGINES:
        raise ValueError(f"{len(found)} devices are named; a server has at most {MAX_ENGINES}")
    return found


def require_agreement(placements: list[EnginePlacement], device: str) -> None:
    """Raises ValueError if the setting `device` contradicts the placements."""
    if placements and device not in ("auto", placements[0].kind):
        raise ValueError(
            f"device is {device!r}, and devices names {placements[0].name}; with devices, leave "
            "device at its default"
        )


def _visible(outer: Mapping[str, str]) -> list[str] | None:
    """The GPUs that `CUDA_VISIBLE_DEVICES` leaves, by number; None if it is not set.

    As in CUDA, the list ends at the first entry that is empty or negative.
    """
    if VISIBLE not in outer:
        return None
    found: list[str] = []
    for entry in outer[VISIBLE].split(","):
        if not entry.strip() or entry.strip().startswith("-"):
            break
        found.append(entry.strip())
    return found
