"""Every command line prints text that its standard output cannot encode."""

from __future__ import annotations

import importlib
import io
import sys

import pytest


@pytest.mark.parametrize("module", ["loraplex.cli", "loraplex_server.cli", "loraplex_training.cli"])
def test_a_command_replaces_what_standard_output_cannot_encode(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = importlib.import_module(module)
    printed = io.BytesIO()
    out = io.TextIOWrapper(printed, encoding="latin-1", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    if hasattr(command, "app"):
        monkeypatch.setattr(command, "app", lambda: print("é日本"))
    else:  # the program is chosen by the arguments
        monkeypatch.setattr(command, "_program", lambda: lambda: print("é日本"))
    command.main()
    assert printed.getvalue() == "é??\n".encode("latin-1")
