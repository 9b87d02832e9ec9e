"""Points at which tests inject faults cost a program that runs next to nothing."""

from __future__ import annotations

import dis
import subprocess
import sys
from typing import Any

import pytest
from loraplex_model.base import faults
from loraplex_model.base.faults import injected, reach


def test_a_point_without_an_action_reads_one_global_and_calls_nothing() -> None:
    reads = [i.argval for i in dis.get_instructions(reach) if i.opname == "LOAD_GLOBAL"]
    assert reads == ["_action"]
    called: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        called.append(event)

    sys.setprofile(note)
    try:
        reach("nowhere")
    finally:
        sys.setprofile(None)
    assert called == ["call", "return", "c_call"], "reach itself, and the end of the profile"


def test_an_action_is_there_within_its_context_only() -> None:
    seen: list[str] = []

    def inside() -> None:
        with injected(seen.append):
            reach("one")
            raise OSError("injected")

    with pytest.raises(OSError, match="injected"):
        inside()
    reach("two")
    assert seen == ["one"]
    assert faults._action is None


def test_no_environment_installs_an_action() -> None:
    code = "import loraplex_model.base.faults as f; assert f._action is None"
    names = ["FAULTS", "LORAPLEX_FAULTS", "LORAPLEX_FAULT", "LORAPLEX_INJECT", "PYTHONFAULTHANDLER"]
    path = ":".join(filter(None, sys.path))
    environment = {**dict.fromkeys(names, "1"), "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
