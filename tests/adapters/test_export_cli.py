"""`export` and `convert` as commands: complete directories or none, and one line for a refusal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from adapters.adapter_files import BASE
from adapters.export_bases import Bases
from adapters.peft_files import CASES, lora, write
from adapters.test_adapterhub import PFEIFFER
from adapters.test_adapterhub import write as write_adapterhub
from loraplex_adapters.convert.export.directory import staged
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.store import Store
from loraplex_model.base.refusal import Refusal
from loraplex_server.commands.program import app
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = lora("llama", {}, target_modules="all-linear", lora_alpha=64)
    return write(case, tmp_path_factory.mktemp("adapters") / "one")


class Shell:
    """Runs the program in its own directory."""

    def __init__(self, bases: Bases, root: Path) -> None:
        self.root, self.out = root, root / "out"
        self._base = ["--model", str(bases.directory("llama")), "--cache", str(bases.cache)]

    def export(self, *arguments: str | Path) -> Any:
        options = ["--out", str(self.out), "--store", str(self.root / "store"), *self._base]
        return CliRunner().invoke(app, ["export", *options, *map(str, arguments)])

    def refused(self, reason: str, *arguments: str | Path) -> str:
        """Returns the single line of a refusal, which leaves no files."""
        before = sorted(self.root.iterdir())
        result = self.export(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith(f"error: {reason}: ")
        assert result.stderr.count("\n") == 1
        assert sorted(self.root.iterdir()) == before
        return str(result.stderr)


@pytest.fixture
def shell(bases: Bases, tmp_path: Path) -> Shell:
    return Shell(bases, tmp_path)


@pytest.mark.parametrize(
    ("format_", "files"),
    [
        ("hf", {"config.json", "generation_config.json", "model.safetensors"}),
        ("nf4", {"config.json", "generation_config.json", "model.safetensors"}),
        ("gguf", {"adapter.gguf"}),
        ("peft", {"adapter_config.json", "adapter_model.safetensors"}),
    ],
)
def test_every_format_is_written_and_described_in_json(
    format_: str, files: set[str], shell: Shell, adapter: Path
) -> None:
    result = shell.export(adapter, "--format", format_)
    assert result.exit_code == 0, result.output
    assert {path.name for path in shell.out.iterdir()} == files
    figures = json.loads(result.stdout.splitlines()[-1])
    assert (figures["format"], figures["out"]) == (format_, str(shell.out))
    assert sorted(shell.root.iterdir()) == [shell.out], "something was left beside it"


@pytest.mark.fault("base-changed-under-store")
def test_a_version_that_is_for_another_base_is_not_exported(
    shell: Shell, bases: Bases, adapter: Path
) -> None:
    other = replace(bases("llama").weights.info, fingerprint="sha256:" + "b" * 64)
    with Store(shell.root / "store") as store:
        store.register("kept", adapter, other.named("models/other"))
    said = shell.refused("BASE_MODEL_MISMATCH", "kept", "--format", "hf")
    assert "kept@1 was registered for the base model other (bbbbbbbbbbbb)" in said


def test_an_id_of_the_store_is_an_adapter_too(shell: Shell, bases: Bases, adapter: Path) -> None:
    with Store(shell.root / "store") as store:
        record, _ = store.register("kept", adapter, bases("llama").weights.info)
    result = shell.export("kept@1", adapter, "--format", "peft", "--blend", "cat")
    assert result.exit_code == 0, result.output
    with Store(shell.root / "store") as store:
        blend, _ = store.register("both", shell.out, bases("llama").weights.info)
    assert blend.provenance["sources"] == f"{record.digest},{record.digest}"
    assert blend.provenance["weights"] == "1,1"
    assert blend.rank == 2 * record.rank
    assert "ADAPTER_NOT_FOUND" in shell.export("other", "--format", "gguf", "--force").stderr


def test_the_servers_settings_say_what_is_not_given(
    bases: Bases, adapter: Path, tmp_path: Path
) -> None:
    settings = {"model": bases.directory("llama"), "cache": bases.cache, "store": tmp_path / "s"}
    file = tmp_path / "server.toml"
    file.write_text("".join(f'{name} = "{value}"\n' for name, value in settings.items()))
    with Store(tmp_path / "s") as store:
        store.register("kept", adapter, bases("llama").weights.info)
    out = tmp_path / "out"
    arguments = ["export", "kept", "--format", "gguf", "--out", str(out), "--config", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (out / "adapter.gguf").exists()


def test_a_blend_goes_into_any_format(shell: Shell, adapter: Path) -> None:
    options = ("--blend", "svd", "--rank", "2", "--weights", "0.5,-0.25")
    result = shell.export(adapter, adapter, "--format", "hf", *options, "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["largest_cut"] > 0


def test_small_changes_rounded_to_bf16_are_spoken_of(shell: Shell, tmp_path: Path) -> None:
    small = write(lora("llama", {}, lora_alpha=0.01), tmp_path.parent / "small")
    result = shell.export(small, "--format", "hf")
    assert "warning: rounding to bfloat16" in result.stderr
    assert "fp16 or fp32" in result.stderr
    refusal = shell.export(small, "--format", "nf4", "--force")
    assert refusal.exit_code == 0
    assert json.loads(refusal.stdout.splitlines()[-1])["retained"] < 0.95


def test_refusals_are_one_line_and_leave_nothing(
    shell: Shell, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    small = write(lora("llama", {}, lora_alpha=0.01), other / "small")
    prompt = write(CASES["prompt"], other / "prompt")
    shell.refused("EXPORT_DELTA_LOST", small, "--format", "nf4")
    shell.refused("EXPORT_UNSUPPORTED", prompt, "--format", "hf")
    shell.refused("EXPORT_UNSUPPORTED", prompt, "--format", "gguf")
    shell.refused("EXPORT_UNSUPPORTED", prompt, adapter, "--format", "peft", "--blend", "cat")
    shell.refused("FIELD_INVALID", adapter, adapter, "--format", "peft")
    shell.refused("FIELD_INVALID", adapter, "--format", "peft", "--weights", "1")
    shell.refused("FIELD_INVALID", adapter, "--format", "peft", "--weights", "a")
    shell.refused("FIELD_INVALID", adapter, "--format", "peft", "--blend", "ties", "--rank", "2")
    shell.refused("ADAPTER_NOT_FOUND", "nowhere", "--format", "peft")
    shell.refused("MODEL_NOT_FOUND", adapter, "--format", "hf", "--model", "/no/such/model")


def test_nothing_is_replaced_without_force_and_only_exports_with_it(
    shell: Shell, adapter: Path
) -> None:
    assert shell.export(adapter, "--format", "peft").exit_code == 0
    before = (shell.out / "adapter_config.json").read_bytes()
    shell.refused("EXPORT_EXISTS", adapter, "--format", "gguf")
    assert (shell.out / "adapter_config.json").read_bytes() == before
    assert shell.export(adapter, "--format", "gguf", "--force").exit_code == 0
    assert [path.name for path in shell.out.iterdir()] == ["adapter.gguf"]
    (shell.out / "adapter.gguf").rename(shell.out / "thesis.txt")
    shell.refused("EXPORT_EXISTS", adapter, "--format", "gguf", "--force")
    assert (shell.out / "thesis.txt").exists()


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out) as target:
        target.mkdir()
        (target / "config.json").write_text("first")

    def fail() -> None:
        with staged(out, force=True) as target:
            target.mkdir()
            (target / "config.json").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert (out / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


def test_a_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def race() -> None:
        with staged(out) as target:
            target.mkdir()
            out.mkdir()
            (out / "someone").write_text("else's")

    with pytest.raises(Refusal) as failed:
        race()
    assert failed.value.reason == "EXPORT_FAILED"
    assert [path.name for path in out.iterdir()] == ["someone"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_place_that_cannot_be_written_is_one_line(shell: Shell, adapter: Path) -> None:
    shell.out = shell.root / "file" / "out"
    (shell.root / "file").write_text("")
    shell.refused("EXPORT_FAILED", adapter, "--format", "peft")


def test_an_adapterhub_adapter_is_converted_whole(tmp_path: Path) -> None:
    write_adapterhub(tmp_path / "source", PFEIFFER)
    out = tmp_path / "out"
    arguments = ["convert", str(tmp_path / "source"), "--out", str(out), "--from", "adapterhub"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert inspect(out, BASE).peft_type == "BOTTLENECK"
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "source"]


def test_convert_needs_what_it_needs(tmp_path: Path, adapter: Path) -> None:
    out = tmp_path / "out"
    run = CliRunner().invoke
    arguments = ["convert", str(adapter), "--out", str(out), "--from"]
    result = run(app, [*arguments, "pissa"])
    assert (result.exit_code, result.stderr[:21]) == (2, "error: FIELD_INVALID:")
    result = run(app, [*arguments, "pissa", "--initial", str(adapter)])
    assert (result.exit_code, result.stderr[:27]) == (2, "error: CONVERT_UNSUPPORTED:")
    result = run(app, [*arguments, "adapterhub"])
    assert (result.exit_code, result.stderr[:23]) == (2, "error: ADAPTER_INVALID:")
    assert not list(tmp_path.iterdir())
