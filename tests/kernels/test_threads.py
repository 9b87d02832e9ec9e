"""The threads of a pass: phases in order whichever threads run, failures, forks; R6."""

from __future__ import annotations

import ctypes
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int32, c_uint32
from pathlib import Path

import numpy as np
import pytest
from loraplex_model.decoder.layout import Fault

WIDTH = 600
FEW = [1, 3, 0, 2, 1, 0, 0, 1, 2, 1] * 20
MANY = [WIDTH, 97, 250, 1, 40] * 20
NESTED = -1
ALLOCATION, INNER_PASS = 1, 2


def start() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2**32, 2 * WIDTH, np.uint32)


def expected(units: list[int], passes: int) -> np.ndarray:
    """The phases of `loraplex_phases`, one after the other."""
    numbers = start().reshape(2, WIDTH)
    others = (7 * np.arange(WIDTH) + 3) % WIDTH
    for _ in range(passes):
        source = 0
        for phase, count in enumerate(units):
            if count:
                row = numbers[source]
                numbers[1 - source] = (row ^ row[others]) * np.uint32(2654435761) + np.uint32(phase)
                source = 1 - source
    return numbers.reshape(-1)


def phases(
    library: ctypes.CDLL,
    threads: int,
    units: list[int],
    passes: int = 1,
    failure: int = 0,
    at: int = 0,
) -> tuple[int, np.ndarray]:
    """What `loraplex_phases` returns, and the numbers that it computed."""
    numbers = start()
    pointer = numbers.ctypes.data_as(ctypes.POINTER(c_uint32))
    counts = (c_int32 * len(units))(*units)
    fault = library.loraplex_phases(
        threads, passes, len(units), counts, WIDTH, pointer, failure, at
    )
    return fault, numbers


@pytest.mark.parametrize("units", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("threads", range(1, 9))
def test_every_phase_reads_all_of_the_phase_before(
    library: ctypes.CDLL, threads: int, units: list[int]
) -> None:
    """Also with more threads than processors, which are then late at any place."""
    fault, numbers = phases(library, threads, units, passes=20)
    assert fault == Fault.NO_FAULT
    np.testing.assert_array_equal(numbers, expected(units, passes=20))


def test_passes_of_several_callers_do_not_mix(library: ctypes.CDLL) -> None:
    """Two decoders of one process, in threads that call at the same time."""
    want = expected(MANY, passes=10)
    with ThreadPoolExecutor(3) as callers:
        for _ in range(5):
            calls = [callers.submit(phases, library, 3, MANY, 10) for _ in range(3)]
            for call in calls:
                fault, numbers = call.result()
                assert fault == Fault.NO_FAULT
                np.testing.assert_array_equal(numbers, want)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(
    ("failure", "fault"), [(ALLOCATION, Fault.NO_MEMORY), (INNER_PASS, NESTED)]
)
def test_a_failure_in_a_unit_ends_the_pass_and_not_the_threads(
    library: ctypes.CDLL, threads: int, failure: int, fault: int
) -> None:
    for at in (0, 50, len(MANY) - 1):
        assert phases(library, threads, MANY, 3, failure, at)[0] == fault
        found, numbers = phases(library, threads, MANY)
        assert found == Fault.NO_FAULT
        np.testing.assert_array_equal(numbers, expected(MANY, passes=1))


def test_a_forked_process_has_threads_of_its_own(library: ctypes.CDLL) -> None:
    """The threads of the parent do not exist in the child, which must neither wait nor fail."""
    want = expected(MANY, passes=1)
    assert phases(library, 3, MANY)[0] == Fault.NO_FAULT
    child = os.fork()
    if not child:
        signal.alarm(60)
        fault, numbers = phases(library, 3, MANY)
        os._exit(0 if fault == Fault.NO_FAULT and np.array_equal(numbers, want) else 1)
    assert os.waitpid(child, 0)[1] == 0
    fault, numbers = phases(library, 3, MANY)
    assert fault == Fault.NO_FAULT
    np.testing.assert_array_equal(numbers, want)


def test_threads_have_names_and_block_signals(library: ctypes.CDLL) -> None:
    """A signal is handled by Python's threads, so a thread of the kernels must not take it."""
    phases(library, 3, MANY)
    names, blocked = set(), []
    for task in os.listdir("/proc/self/task"):
        lines = Path(f"/proc/self/task/{task}/status").read_text().splitlines()
        fields = dict(line.split(":\t", 1) for line in lines)
        if fields["Name"].startswith("loraplex "):
            names.add(fields["Name"])
            blocked.append(int(fields["SigBlk"], 16) >> (signal.SIGTERM - 1) & 1)
    assert names >= {"loraplex 1", "loraplex 2"}
    assert all(blocked)
