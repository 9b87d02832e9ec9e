"""The commands that know adapters' formats, and the document that quotes one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer
from loraplex_adapters.format import matrix
from loraplex_adapters.format.kinds import KINDS
from loraplex_server.commands import export_cli
from safetensors.torch import save_file
from typer.testing import CliRunner

DOCUMENT = Path(__file__).parents[2] / "docs/adapters.md"
BEGIN, END = "<!-- support-matrix: begin -->\n", "\n<!-- support-matrix: end -->"


@pytest.fixture
def program() -> typer.Typer:
    app = typer.Typer()
    export_cli.add_commands(app)
    return app


def test_the_document_shows_what_the_command_prints(program: typer.Typer) -> None:
    ran = CliRunner().invoke(program, ["support-matrix"])
    assert ran.exit_code == 0
    text = DOCUMENT.read_text()
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert shown == ran.stdout.strip() == matrix.markdown()


def test_every_kind_and_option_has_a_line() -> None:
    lines = matrix.markdown().splitlines()
    for kind in KINDS.values():
        for key, option in kind.options.items():
            assert (
                f"| `{kind.peft_type}` | `{key}` | {option.support.value} | {option.note} |"
                in lines
            )


def test_an_import_says_what_it_did_or_why_not(program: typer.Typer, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    config = {"output_adapter": True, "original_ln_before": True, "non_linearity": "relu"}
    outer = {"model_type": "llama", "version": "adapters.1.3.0", "config": config}
    (source / "adapter_config.json").write_text(json.dumps(outer))
    place = "model.layers.0.output_adapters.adapters.x"
    save_file(
        {
            f"{place}.adapter_down.0.weight": torch.zeros(2, 8),
            f"{place}.adapter_up.weight": torch.zeros(8, 2),
        },
        source / "adapter.safetensors",
    )
    ran = CliRunner().invoke(program, ["import-adapterhub", str(source), str(target)])
    assert ran.exit_code == 0, ran.output
    assert json.loads((target / "adapter_config.json").read_text())["reads"] == "stream"
    again = CliRunner().invoke(program, ["import-adapterhub", str(source), str(target)])
    assert again.exit_code == 1
    assert "FIELD_INVALID" in again.output
