"""The clocks of `bench/step.py` find every phase of a pass, and give it the right name."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import phases
import pytest
from loraplex_model.ops import build

SOURCE = """\
  void run() {
    team_.run(phase, rows, [&](int t) { embed(t); });
    project(phase, layer.gate_up, x, y);
    team_.run(phase, rows * heads, [&](int unit) {  // in two lines
      attention(layer, unit);
    });
  }
  void project(int& phase) {
    team_.run(phase, shrinks + units, [&](int unit) {
      matmul_unit(x, unit);
    });
  }
"""


def test_every_phase_has_a_clock_and_stays_in_its_line() -> None:
    timed = phases.timed(SOURCE, "decoder.h")
    assert timed.count("\n") == SOURCE.count("\n")
    assert timed.count('timed_run("decoder.h", __LINE__, team_, phase,') == 3
    assert 'PhaseClock::part = "gate_up"; project(phase, layer.gate_up, x, y);' in timed
    assert "void project(int& phase)" in timed


def test_a_phase_is_named_by_what_it_calls() -> None:
    timed = phases.timed(SOURCE, "decoder.h")
    assert phases.label(timed, 2, "") == "embeddings"
    assert phases.label(timed, 4, "gate_up") == "attention"
    assert phases.label(timed, 9, "gate_up") == "product: gate_up"


def test_the_decoder_has_no_phase_without_a_name() -> None:
    source = phases.timed((build.SOURCES / "decoder.h").read_text(), "decoder.h")
    lines = [i for i, line in enumerate(source.splitlines(), 1) if "timed_run(" in line]
    assert len(lines) >= 10
    names = [phases.label(source, line, "qkv") for line in lines]
    assert not [name for name in names if name.startswith("other: ")]
    assert {"embeddings", "attention", "activation", "product: qkv", "LoRA expand"} <= set(names)
    calls = re.findall(r'PhaseClock::part = "(\w+)"', source)
    assert {"qkv", "o", "gate_up", "down", "lm_head"} <= set(calls)


def test_sources_with_clocks_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SOURCES", build.SOURCES)  # restored at the end
    folder = tmp_path / "sources"
    phases.instrument(folder)
    build.source_digest.cache_clear()
    compiler = os.environ.get("CXX", "c++")
    for flags in (build.ISAS["portable"], ["-DLORAPLEX_BF16=2", "-DLANES=16"]):
        command = [compiler, "-std=c++20", "-fopenmp", "-Wno-psabi", "-fsyntax-only", *flags]
        done = subprocess.run([*command, folder / "library.cpp"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
