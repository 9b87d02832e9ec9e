"""Before memory runs out, what would take more is refused, step by step, and nothing that runs."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_server.access.roles import METHOD_ROLES
from loraplex_server.metrics import Metrics
from loraplex_server.runtime import pressure as module
from loraplex_server.runtime.pressure import MemoryPressure, Pressure
from loraplex_server.runtime.process_memory import (
    PART_OF_GRANT,
    default_limit,
    give_back,
    granted_bytes,
    used_bytes,
)
from prometheus_client import CollectorRegistry

MIB = 1 << 20


class Host:
    """Host memory that notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[int | None] = []

    def limit_host_memory(self, fewer: int | None) -> None:
        self.asked.append(fewer)


def watched(limit: int = 1000 * MIB) -> tuple[MemoryPressure, Host, Metrics]:
    host, metrics = Host(), Metrics(CollectorRegistry())
    return MemoryPressure(limit, lambda: 0, host, metrics.series), host, metrics


def refused(pressure: MemoryPressure) -> set[str]:
    """Names of the methods that are refused now."""
    names = set()
    for method in METHOD_ROLES:
        name = method.rpartition("/")[2]
        try:
            pressure.require(name)
        except Refusal:
            names.add(name)
    return names


def test_a_refusal_says_why_and_when_to_come_back() -> None:
    pressure, _, _ = watched()
    pressure.look(1000 * MIB)
    with pytest.raises(Refusal, match="short of memory") as caught:
        pressure.require("Generate")
    assert caught.value.reason is Reason.OVERLOADED
    assert caught.value.retry_seconds == module.RETRY_SECONDS


GROWTH = {
    "StartUpload", "UploadAdapter", "RegisterAdapter", "ValidateAdapter", "MergeAdapter",
    "CreateJob", "UploadData",
}  # fmt: skip
WORK = {"Generate", "GenerateStream", "Embed", "LoadAdapter", "PinAdapter", "RenderChat"}


@pytest.mark.parametrize(
    ("percent", "level", "methods"),
    [
        (0, 0, set()),
        (89.9, 0, set()),
        (90, 1, GROWTH),
        (94.9, 1, GROWTH),
        (95, 2, GROWTH),
        (99.9, 2, GROWTH),
        (100, 3, GROWTH | WORK),
        (400, 3, GROWTH | WORK),
    ],
)
def test_each_level_refuses_what_would_take_memory(
    percent: float, level: int, methods: set[str]
) -> None:
    pressure, _, metrics = watched()
    pressure.look(int(percent * 10 * MIB))
    assert pressure.level == level
    assert refused(pressure) == methods
    sample = metrics.registry.get_sample_value
    assert sample("loraplex_memory_pressure") == level
    assert sample("loraplex_memory_bytes", {"kind": "limit"}) == 1000 * MIB
    assert sample("loraplex_memory_bytes", {"kind": "used"}) == int(percent * 10 * MIB)


def test_levels_end_below_their_begin_and_are_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pressure, _, _ = watched()
    levels = []
    with caplog.at_level(logging.INFO, module.__name__):
        for percent in (80, 90, 88, 90, 86, 85.1, 84.9, 89, 95, 91, 100, 96, 95.1, 94, 92, 89, 84):
            pressure.look(int(percent * 10) * MIB)
            levels.append(int(pressure.level))
    assert levels == [0, 1, 1, 1, 1, 1, 0, 0, 2, 2, 3, 3, 3, 2, 2, 1, 0]
    assert len(caplog.messages) == 7
    assert "900 MiB" in caplog.messages[0]
    assert "memory_limit is 1000 MiB" in caplog.messages[0]
    assert [record.levelname for record in caplog.records].count("WARNING") == 3


def test_host_memory_is_asked_back_by_the_excess_until_there_is_room() -> None:
    pressure, host, _ = watched()
    for percent in (94, 95, 97, 92, 89.9, 86):
        pressure.look(int(percent * 10) * MIB)
    assert host.asked == [50 * MIB, 70 * MIB, 20 * MIB]
    pressure.look(840 * MIB)
    assert host.asked[-1] is None
    pressure.look(800 * MIB)
    assert len(host.asked) == 4


def test_an_unknown_limit_refuses_nothing() -> None:
    pressure, host, _ = watched(limit=0)
    pressure.look(1 << 60)
    assert pressure.level is Pressure.NONE
    assert not host.asked


async def test_the_watch_measures_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.001)
    measured = iter([100, 990, 100])
    seen = asyncio.Event()

    def measure() -> int:
        found = next(measured, None)
        if found is None:
            seen.set()
            return 100 * MIB
        return found * MIB

    host, metrics = Host(), Metrics(CollectorRegistry())
    pressure = MemoryPressure(1000 * MIB, measure, host, metrics.series)
    task = asyncio.create_task(pressure.watch())
    while not seen.is_set():  # noqa: ASYNC110  (set in a thread)
        await asyncio.sleep(0.001)
    task.cancel()
    assert len(host.asked) == 2


# what the system says


def test_the_memory_of_child_processes_counts() -> None:
    before = used_bytes()
    assert before > 10 * MIB
    code = "import sys; held = bytearray(64 << 20); print('held', flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert used_bytes() >= before + 60 * MIB
    finally:
        child.kill()
        child.communicate()


def fake_system(folder: Path, total_kib: int = 1 << 20) -> tuple[Path, Path]:
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    (proc / "meminfo").write_text(f"MemTotal:  {total_kib} kB\nMemFree: 1 kB\n")
    return proc, cgroups


def test_the_limit_is_that_of_the_machine_or_of_the_tightest_control_group(tmp_path: Path) -> None:
    proc, cgroups = fake_system(tmp_path)
    assert granted_bytes(proc, cgroups) == 1 << 30
    assert default_limit(proc, cgroups) == int(PART_OF_GRANT * (1 << 30))
    group = cgroups / "system.slice/loraplex.service"
    group.mkdir(parents=True)
    (proc / "self/cgroup").write_text("1:name=old:/x\n0::/system.slice/loraplex.service\n")
    (group / "memory.max").write_text("max\n")
    assert granted_bytes(proc, cgroups) == 1 << 30
    (group.parent / "memory.max").write_text(f"{300 * MIB}\n")
    assert granted_bytes(proc, cgroups) == 300 * MIB
    (group / "memory.max").write_text(f"{200 * MIB}\n")
    assert granted_bytes(proc, cgroups) == 200 * MIB
    (cgroups / "memory.max").write_text(f"{100 * MIB}\n")  # as in a container
    assert granted_bytes(proc, cgroups) == 100 * MIB


def test_control_groups_of_version_1_count_too(tmp_path: Path) -> None:
    proc, cgroups = fake_system(tmp_path)
    group = cgroups / "memory/docker/abc"
    group.mkdir(parents=True)
    (proc / "self/cgroup").write_text("4:pids:/other\n3:cpu,memory:/docker/abc\n0::/\n")
    (cgroups / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")  # no limit
    (group / "memory.limit_in_bytes").write_text(f"{300 * MIB}\n")
    assert granted_bytes(proc, cgroups) == 300 * MIB
    (cgroups / "memory/memory.limit_in_bytes").write_text(f"{100 * MIB}\n")  # as in a container
    assert granted_bytes(proc, cgroups) == 100 * MIB


def test_a_group_with_more_than_the_machine_does_not_raise_the_limit(tmp_path: Path) -> None:
    proc, cgroups = fake_system(tmp_path)
    (cgroups / "memory.max").write_text(f"{1 << 50}\n")
    assert granted_bytes(proc, cgroups) == 1 << 30


def test_a_system_that_tells_nothing_sets_no_limit(tmp_path: Path) -> None:
    assert granted_bytes(tmp_path, tmp_path) == 0
    assert used_bytes(tmp_path) == 0


def test_status_files_of_processes_are_summed(tmp_path: Path) -> None:
    me = os.getpid()
    for pid, children, anonymous in ((me, "7 8", 100), (7, "9", 20), (8, "", 3), (9, "7", 1)):
        folder = tmp_path / str(pid)
        (folder / f"task/{pid}").mkdir(parents=True)
        (folder / f"task/{pid}/children").write_text(children)
        lines = f"Name:\tx\nRssAnon:\t {anonymous} kB\nRssFile:\t 9999 kB\nRssShmem:\t 1000 kB\n"
        (folder / "status").write_text(lines)
    assert used_bytes(tmp_path) == (124 + 4000) << 10


def test_giving_back_is_harmless() -> None:
    give_back()
