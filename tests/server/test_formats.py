"""The commands that know adapters' formats, and the document that quotes one of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import typer
from families import variants
from loraplex_adapters.format import matrix
from loraplex_adapters.format.kinds import KINDS
from loraplex_model.base.families import FAMILIES, TEXT_PARTS
from loraplex_model.base.hf_config import decoder_config
from loraplex_model.checkpoints.outlook import features
from loraplex_model.decoder.cuda import support
from loraplex_server.commands import export_cli, support_matrix
from loraplex_server.commands.program import app
from peft import PeftType
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

DOCUMENTS = Path(__file__).parents[2] / "docs"
MARKS = {"models.md": "families", "adapters.md": "support-matrix"}
"""The documents that quote the command, and the name of the place where they do."""


def quoted(document: str, mark: str) -> str:
    begin, end = f"<!-- {mark}: begin -->\n", f"\n<!-- {mark}: end -->"
    text = (DOCUMENTS / document).read_text()
    return text[text.index(begin) + len(begin) : text.index(end)]


@pytest.fixture
def program() -> typer.Typer:
    app = typer.Typer()
    export_cli.add_commands(app)
    return app


def test_the_documents_show_what_the_command_prints() -> None:
    """Families of base models, kinds of adapters and their options, and one line for programs."""
    ran = CliRunner().invoke(app, ["support-matrix"])
    assert ran.exit_code == 0
    families, kinds = (quoted(name, mark) for name, mark in MARKS.items())
    printed, _, last = ran.stdout.strip().rpartition("\n")
    assert printed == f"{families}\n\n{kinds}\n"
    assert kinds == matrix.markdown()
    served = KINDS.keys() & set(PeftType)
    assert json.loads(last) == {
        "families": len(FAMILIES),
        "kinds_served": len(served),
        "of": len(PeftType),
    }


def test_every_family_has_a_line_with_all_its_features() -> None:
    """Every field of a family's row has a phrase, or is one that goes without saying."""
    table = support_matrix.families_markdown()
    assert len(re.findall(r"^\| `", table, re.MULTILINE)) == len(FAMILIES) + len(TEXT_PARTS)
    for architecture, family in FAMILIES.items():
        (line,) = [each for each in table.splitlines() if each.startswith(f"| `{architecture}` |")]
        for name in {*family.fixed, *family.settings} - features.SILENT:
            phrase = "joined " if name == "joined" else features.PHRASES[name]
            assert phrase in line, name
        assert not family.gguf or f"| `{family.gguf}` |" in line


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_the_table_says_where_the_kernels_for_cuda_compute(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "obstacle_to_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kind, changes = variants.VARIANTS[variant]
    (name,) = [name for name, row in FAMILIES.items() if row.model_type == kind]
    raw = CONFIG_MAPPING[kind](**{**variants._SHAPE, **changes}).to_dict()
    config = decoder_config({**raw, "architectures": [name]})
    why = support.obstacle_to_kernels(torch.device("cuda"), torch.float32, config)
    (line,) = [
        each
        for each in support_matrix.families_markdown().splitlines()
        if each.startswith(f"| `{name}` |")
    ]
    assert ("| kernels |" in line) == (why is None)


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
