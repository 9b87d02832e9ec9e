"""Memory in use is the memory by budget, measured while requests run and adapters come and go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine import churn
from engine.driving import Engine, adapter
from engine.oracle import OracleRunner
from loraplex_model.ops import mapping
from loraplex_server.engine.memory import MEASURE_SECONDS, MemoryGauge, anonymous_bytes

LOADS = 96
MARGIN = 80 << 20
"""Bytes beyond those accounted for: the buffers of a step, two reads, and an adapter on its way."""
GROWTH = 24 << 20
"""Bytes by which that may change from the second eighth of the loads to the last."""

pytestmark = pytest.mark.skipif(not anonymous_bytes(), reason="this system reports no memory")


@pytest.mark.slow
@pytest.mark.timeout(960)  # 100 s on idle cores
@pytest.mark.fault("churn-grows-memory")
@pytest.mark.fault("memory-measured-idle")
def test_adapters_that_come_and_go_leave_no_memory_behind(tmp_path: Path) -> None:
    """A process of its own with 24 requests running whenever its memory is measured."""
    tests = str(Path(__file__).resolve().parents[1])
    paths = [tests, os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, churn.__file__, str(tmp_path / "model"), str(tmp_path), str(LOADS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(report["loads"] >= LOADS * part // 8 for part, report in enumerate(reports, 1))
    beyond = [report["memory"] - report["accounted"] for report in reports]
    assert max(beyond) <= MARGIN
    assert beyond[-1] - beyond[1] <= GROWTH


@pytest.mark.fault("churn-grows-memory")
def test_large_tensors_return_their_memory_to_the_system() -> None:
    """Blocks between those that stay are returned too, as a heap could not do."""
    size, kept = 3 << 20, []
    before = anonymous_bytes()
    for _ in range(20):
        gone, stays = mapping.zeros(size), mapping.zeros(size // 4)
        gone.fill_(1)
        kept.append(stays.fill_(1))
        del gone
    taken = anonymous_bytes() - before
    assert taken < 20 * size // 4 + 4 * size
    assert all(bool((tensor == 1).all()) for tensor in kept)


@pytest.mark.parametrize("nbytes", [0, 1, (1 << 17) - 1, 1 << 17, (1 << 21) + 5])
def test_mapped_tensors_are_zero_and_can_be_written(nbytes: int) -> None:
    tensor = mapping.zeros(nbytes)
    assert tensor.shape == (nbytes,)
    assert tensor.dtype is torch.uint8
    assert not tensor.any()
    tensor.fill_(7)
    assert int(tensor.long().sum()) == 7 * nbytes


def test_a_moved_tensor_has_the_same_values_in_other_memory() -> None:
    tensor = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)).bfloat16()
    copy = mapping.moved(tensor)
    assert torch.equal(copy, tensor)
    assert copy.dtype is tensor.dtype
    assert copy.data_ptr() != tensor.data_ptr()


def test_memory_is_measured_at_most_once_in_a_while() -> None:
    now, sizes = [0.0], iter([100, 120, 140])
    gauge = MemoryGauge(lambda: now[0], lambda: next(sizes))
    assert (gauge.at_start, gauge.nbytes) == (100, 100)
    now[0] += MEASURE_SECONDS
    assert [gauge.nbytes for _ in range(5)] == [120] * 5


@pytest.mark.fault("churn-grows-memory")
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_what_is_accounted_for_is_the_bytes_of_all_tiers_in_host_memory(
    device: str,
) -> None:
    """On an accelerator the adapter on the device is not in this process's memory."""
    runner = OracleRunner(adapter_budget_bytes=50, host_budget_bytes=100, device=device)
    engine = Engine(runner)
    for id, (name, size) in enumerate([("a", 40), ("b", 50)], 1):
        engine.submit(id, [id], 2, adapters=[adapter(name, nbytes=size)])
        engine.run()
    engine.submit(3, [3], 5)
    report = engine.step()
    assert report is not None
    host = 40 if device == "cpu" else 90
    assert report.stats.host_bytes == host
    at_start = engine.core._reporter._memory.at_start
    assert report.stats.accounted_bytes - at_start == 90
    assert report.stats.memory_bytes > 0
