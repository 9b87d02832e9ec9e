"""With `log_format` json every line of front and engines is JSON, and names its request."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from loraplex import Client, LoraplexError
from loraplex_server.logs import JsonFormatter, configure_engine
from rpc.harness import CRASH, FAULT, NONFINITE

from deploy import live


def lines(folder: Path) -> list[dict[str, Any]]:
    """Every line that the server wrote to standard error."""
    return [json.loads(line) for line in (folder / "server.log").read_text().splitlines()]


def provoke(client: Client, **arguments: Any) -> None:
    with pytest.raises(LoraplexError):
        client.generate(max_new_tokens=2, timeout=20.0, **arguments)


def test_lines_of_the_engine_name_the_requests_that_they_are_about(tmp_path: Path) -> None:
    (tmp_path / "import").mkdir()
    with (
        live.server(tmp_path, log_format="json", log_level="info") as server,
        Client(server.target, timeout=30.0) as client,
    ):
        provoke(client, token_ids=[20, FAULT], request_id="canary-fault")
        provoke(client, token_ids=[20, NONFINITE])
        provoke(client, prompt="canary-prompt", adapter="nobody", request_id="find-me")
    seen = lines(tmp_path)
    (failed,) = [line for line in seen if "exception" in line]
    assert failed["process"] == "engine"
    assert failed["request_ids"] == ["canary-fault"]
    assert failed["level"] == "error"
    (ended,) = [line for line in seen if line.get("request_id") == "find-me"]
    assert ended["reason"] == "ADAPTER_NOT_FOUND"
    assert not any("canary-prompt" in json.dumps(line) for line in seen)


def test_engines_say_which_they_are_and_a_lost_one_is_reported(tmp_path: Path) -> None:
    (tmp_path / "import").mkdir()
    with (
        live.server(tmp_path, log_format="json", devices="cpu,cpu") as server,
        Client(server.target, timeout=30.0) as client,
    ):
        provoke(client, token_ids=[20, FAULT])
        provoke(client, token_ids=[20, CRASH])
    seen = lines(tmp_path)
    (failed,) = [line for line in seen if "exception" in line]
    assert failed["device"] in ("cpu:0", "cpu:1")
    assert any("was lost" in line["message"] for line in seen)


def test_warnings_of_python_are_lines_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    try:
        configure_engine("cpu:1", "json")
        warnings.warn("beware", stacklevel=1)
    finally:
        logging.captureWarnings(False)
    line = json.loads(capsys.readouterr().err)
    assert line["logger"] == "py.warnings"
    assert "beware" in line["message"]
    assert (line["process"], line["device"]) == ("engine", "cpu:1")


def test_a_field_of_a_record_does_not_hide_those_of_the_process() -> None:
    record = logging.makeLogRecord({"msg": "a", "levelname": "INFO", "request_ids": ["x\ny"]})
    line = JsonFormatter(process="engine").format(record)
    assert line.isprintable()
    assert json.loads(line)["request_ids"] == ["x\ny"]
    assert json.loads(line)["process"] == "engine"
