"""The check on a GPU as a program: stages apart, results as they come, exit codes; no GPU here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_check
import pytest
from gpu.stage import STAGES, Stage, StageReport, read

ROOT = Path(__file__).resolve().parents[2]


def check(*arguments: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--out", str(out), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def last_line(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.splitlines()[-1])


def test_a_stage_runs_without_a_device_and_leaves_its_figures(tmp_path: Path) -> None:
    done = check("--dry", "--only", "S0", out=tmp_path)
    assert done.returncode == 0, done.stderr
    assert last_line(done) == {"dry": True, "stages": 1, "failed": []}
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["stages"]["S0"]["figures"]["copy_tb_s"] > 0
    assert any(line.startswith("S0 ceilings") for line in done.stdout.splitlines())


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "triton.py").write_text("raise RuntimeError('this Triton is broken')\n")
    done = check("--dry", "--only", "S1,S2", out=tmp_path / "out", PYTHONPATH=str(broken))
    assert done.returncode == 1
    assert last_line(done) == {"dry": True, "stages": 2, "failed": ["S1", "S2"]}
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    for stage in written["stages"].values():
        assert stage["failed"] == ["RuntimeError: this Triton is broken"]


def test_a_stage_that_hangs_is_ended_with_what_it_has_written(tmp_path: Path) -> None:
    # No stage can import torch and end within this time.
    result = gpu_check.run_stage(STAGES[0], True, 0.3, tmp_path, str(tmp_path))
    assert result["failed"] == ["it was ended after 0 s"]
    assert result["seconds"] < 60


def test_no_stage_begins_when_the_budget_is_used_up(tmp_path: Path) -> None:
    done = check("--dry", "--only", "S0", "--budget", "2", out=tmp_path)
    assert done.returncode == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"]["S0"]["failed"]


def test_without_a_device_the_check_says_so(tmp_path: Path) -> None:
    done = check(out=tmp_path)
    assert done.returncode == 2
    assert "finds no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    done = check("--only", "S0,S99", out=tmp_path)
    assert done.returncode == 2
    assert "there is no stage S99" in done.stderr


def test_the_shares_of_the_stages_fit_the_budget() -> None:
    assert sum(stage.seconds for stage in STAGES) <= gpu_check.BUDGET
    assert [stage.name for stage in STAGES] == [f"S{i}" for i in range(8)]
    for stage in STAGES:
        assert f"{stage.name} {stage.module}" in (gpu_check.__doc__ or "")


def test_results_are_written_while_a_stage_runs(tmp_path: Path) -> None:
    report = StageReport(tmp_path / "S0.json", True, "cpu", 10)
    report.figure("rate", 3.0)
    report.check(False, "one differs from two")
    found = read(tmp_path / "S0.json")
    assert found["figures"] == {"rate": 3.0}
    assert found["failed"] == ["one differs from two"]
    assert not found["done"]
    assert report.other("S0") == {"rate": 3.0}


def test_an_exception_of_a_stage_is_a_failure(tmp_path: Path) -> None:
    def stage(report: StageReport) -> None:
        report.check(True, "fine")
        raise ValueError("broken")

    report = StageReport(tmp_path / "S3.json", True, "cpu", 10)
    assert not report.run(stage)
    found = read(tmp_path / "S3.json")
    assert found["done"]
    assert found["failed"] == ["ValueError: broken"]


def test_the_last_line_compares_with_the_peer_case_by_case() -> None:
    results = {
        "S0": {"failed": [], "figures": {"card": "H100"}},
        "S2": {"failed": ["x"]},
        "S5": {"failed": [], "figures": {"tok_s": {"base_16": 100.0, "base_64": 300.0}}},
        "S6": {"failed": [], "figures": {"tok_s": {"base_16": 20.0}}},
    }
    found = gpu_check.summary(results, dry=False)
    assert found["card"] == "H100"
    assert found["failed"] == ["S2"]
    assert found["ratio_peft"] == {"base_16": 5.0}
    assert gpu_check.summary(results, dry=True) == {"dry": True, "stages": 4, "failed": ["S2"]}


@pytest.mark.parametrize("dry", [True, False])
def test_kernels_are_interpreted_only_in_a_dry_run(dry: bool) -> None:
    for stage in STAGES:
        values = gpu_check.environment(dry, stage, "cache")
        # Compiling needs no device, and is not possible for interpreted kernels.
        assert (values.get("TRITON_INTERPRET") == "1") is (dry and stage.module != "compiled")


def test_the_engine_needs_no_package_that_a_machine_with_torch_may_lack() -> None:
    absent = ["pydantic", "pydantic_settings", "gguf", "sqlalchemy", "tokenizers", "rich", "regex"]
    absent += ["bitsandbytes", "tensorboard", "matplotlib", "psutil", "grpc_status"]
    modules = "loraplex_server.engine.core, loraplex_server.engine.runner.local"
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {modules}"
    stage = Stage("S5", "engine", 1)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=gpu_check.environment(True, stage, "cache"),
    )
    assert done.returncode == 0, done.stderr
