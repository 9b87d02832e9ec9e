"""`loraplex-server doctor` reads what the server keeps in its cache, and says what is damaged."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from loraplex_model.checkpoints import default_model, load
from loraplex_model.decoder.cuda.choices import FILE, Timings
from loraplex_model.ops import build, known_faults
from loraplex_server.commands import doctor, doctor_base, doctor_cuda
from loraplex_server.config import Config
from loraplex_server.config_sources import load as load_config
from loraplex_server.declared.named import NamedAdapter
from rpc.certificates import Authority

from model import tiny

ISA = build.supported_isas()[0]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A cache with a converted model and, as far as a digest tells, kernels."""
    checkpoint = tiny.write("llama", tmp_path / "model")
    load.load_base(str(checkpoint), torch.float32, tmp_path / "cache")
    monkeypatch.delenv("LORAPLEX_KERNELS_DIR", raising=False)
    kernels = tmp_path / "cache" / "kernels" / build._name(ISA, ()) / build.LIBRARY
    kernels.parent.mkdir(parents=True)
    kernels.write_bytes(b"kernels")
    (kernels.parent / build.DIGEST).write_text(build._file_digest(kernels))
    flags = {"model": str(checkpoint), "cache": str(tmp_path / "cache"), "port": "0"}
    return load_config(None, {**flags, "admin_port": "0", "store": str(tmp_path / "store")})


def bad(config: Config) -> list[str]:
    return [f"{c.subject}: {c.text}" for c in doctor.examine(config) if not c.good]


def test_the_end_tokens_of_a_converted_base_are_listed(config: Config) -> None:
    shown = [check.text for check in doctor.examine(config) if check.subject == "end tokens"]
    assert shown == ["2"]  # without a spelling, since the base has no tokenizer
    unknown = config.model_copy(update={"cache": config.cache / "other"})
    assert all(check.subject != "end tokens" for check in doctor.examine(unknown))


def test_the_certificate_is_checked_as_the_server_would(config: Config, tmp_path: Path) -> None:
    assert all(check.subject != "certificate" for check in doctor.examine(config))
    made, other = (Authority(tmp_path / name).issue("server") for name in "ab")
    right = {"tls_certificate": made.chain, "tls_key": made.key}
    encrypted = config.model_copy(update=right)
    assert bad(encrypted) == []
    (shown,) = [c.text for c in doctor.examine(encrypted) if c.subject == "certificate"]
    assert shown.startswith("expires on 20")
    (found,) = bad(config.model_copy(update={**right, "tls_key": other.key}))
    assert found.startswith(f"certificate: tls_key {other.key}: is not the key of")


def test_a_mistyped_import_root_is_named(config: Config, tmp_path: Path) -> None:
    (found,) = bad(config.model_copy(update={"import_root": tmp_path / "imprt"}))
    assert found.startswith(f"import_root: {tmp_path / 'imprt'}: no such directory")


def test_what_the_settings_declare_is_looked_at(config: Config, tmp_path: Path) -> None:
    missing = config.model_copy(update={"adapter_directory": tmp_path / "none"})
    (found,) = bad(missing)
    assert found.startswith(f"directory: {tmp_path / 'none'}: not a directory")
    assert bad(config.model_copy(update={"adapter_directory": tmp_path})) == []
    named = NamedAdapter(name="a", path=tmp_path / "a")
    (found,) = bad(config.model_copy(update={"adapters": (named,)}))
    assert str(tmp_path / "a") in found


def test_who_may_call_is_shown_and_a_fault_in_its_files_is_named(
    config: Config, tmp_path: Path
) -> None:
    def shown(config: Config) -> list[str]:
        return [check.text for check in doctor.examine(config) if check.subject == "principals"]

    assert shown(config) == ["none; callers are not authenticated"]
    file, keys = tmp_path / "principals.toml", tmp_path / "keys.json"
    authenticated = config.model_copy(update={"principals": file, "keys": keys})
    file.write_text("[principals.a]\nroles = []")
    assert shown(authenticated) == [f"1 in {file}"]
    assert bad(authenticated) == []
    file.write_text('[principals.a]\nroles = ["x"]\nbase = 1')
    assert [text.split(": ")[:3] for text in bad(authenticated)] == [
        ["principals", str(file), "principals.a.roles.0"],
        ["principals", str(file), "principals.a.base"],
    ]


@pytest.mark.fault("base-cache-damaged")
def test_a_damaged_base_is_named(config: Config, tmp_path: Path) -> None:
    assert bad(config) == []
    (file,) = (tmp_path / "cache").glob("entries/*/decoder.json")
    text = file.read_text()
    file.write_text(text.replace("sha256:", "sha256;"))
    (found,) = bad(config)
    assert found.startswith(f"base cache: {file.parent}: damaged")
    assert file.read_text() != text, "doctor changes nothing"


@pytest.mark.fault("base-cache-damaged")
def test_a_damaged_default_model_is_named(config: Config) -> None:
    source = default_model.path_in(config.cache)
    source.parent.mkdir()
    source.write_bytes(b"")
    os.truncate(source, default_model.SIZE)
    (found,) = bad(config)
    assert found.startswith(f"base cache: {source}: damaged")


@pytest.mark.fault("kernel-cache-damaged")
@pytest.mark.parametrize("compiler", ["c++", "no-such-compiler"])
def test_damaged_kernels_are_named(
    compiler: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    (library,) = (tmp_path / "cache").glob(f"kernels/*/{build.LIBRARY}")
    os.truncate(library, 3)
    (found,) = bad(config)
    assert found.startswith(f"kernels: {library.parent}: damaged")
    texts = {check.text for check in doctor.examine(config) if check.subject == "kernels"}
    assert any("many times slower" in text for text in texts) == (compiler != "c++")


@pytest.mark.fault("paged-attention-splits")
def test_packages_with_known_faults_are_named(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known_faults, "version_of", lambda package: "2.4.0")
    (found,) = bad(config)
    assert found.startswith("packages: torch 2.4.0 cannot be used")


def test_the_devices_of_several_engines_and_their_budgets_are_shown(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_memory_bytes", lambda: 8_000_000_000)
    monkeypatch.setattr("loraplex_server.config.available_cores", lambda: 6)
    two = config.model_copy(update={"devices": "cpu,cpu"})
    shown = [f"{c.subject}: {c.text}" for c in doctor.examine(two)]
    assert "device: cpu:1: an engine, CPU threads: 3" in shown
    assert "memory: the budgets of 2 engines are 7.5 GB together, of 8.0 GB" in shown
    assert bad(two) == []
    (found,) = bad(config.model_copy(update={"devices": "cpu,cpu,cpu"}))
    assert found == "memory: the budgets of 3 engines are 11.3 GB together, of 8.0 GB"


def test_a_gpu_that_is_not_there_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"card {number}")
    monkeypatch.setattr(known_faults, "check", lambda device: None)
    monkeypatch.setattr(doctor_cuda, "examine", lambda cache, dtype: [])
    monkeypatch.setattr(doctor_base, "examine", lambda config, adapters, machine_bytes: [])
    two = config.model_copy(update={"devices": "1,2"})
    checks = [c for c in doctor.examine(two) if c.subject == "device"]
    assert [(c.text, c.good) for c in checks] == [
        ("cuda:1: an engine on card 1", True),
        ("cuda:2: no such GPU; CUDA finds 2 (--devices)", False),
    ]


def test_what_was_measured_on_a_card_is_shown(tmp_path: Path) -> None:
    (nothing,) = doctor_cuda.products(tmp_path, "card")
    assert nothing == ("products", "not measured on this card yet; the first start does so")
    timings = Timings(tmp_path / "kernels" / FILE, "card")
    timings.put(
        (576, 1536), 16, {"nf4 a": 9.0, "nf4 b": 8.0, "dense": 7.25, "bitsandbytes": math.inf}
    )
    timings.save()
    assert list(doctor_cuda.products(tmp_path, "card")) == [
        (
            "products",
            "576 x 1536, up to 16 rows: dense 7.2 us, nf4 b 8.0 us, bitsandbytes failed",
        )
    ]


def test_the_packages_that_cuda_uses_are_named(tmp_path: Path) -> None:
    """On this machine torch has no CUDA; no package is needed to say so."""
    found = dict(doctor_cuda.examine(tmp_path, "float32"))
    assert set(found) >= {"kernels", "4-bit products", "varlen_attn"}
    assert found["varlen_attn"] == "the compute type is float32"
    if torch.version.cuda is None:
        assert found["4-bit products"] == "torch is built without CUDA"


@pytest.mark.parametrize("asked", ["avx9", "avx512"])
def test_a_wrong_instruction_set_is_named(
    asked: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setenv("LORAPLEX_ISA", asked)
    (found,) = bad(config)
    assert found.startswith(f"instructions: LORAPLEX_ISA is {asked!r}, which ")
    monkeypatch.setenv("LORAPLEX_ISA", "portable")
    shown = [check.text for check in doctor.examine(config) if check.subject == "kernels"]
    assert bad(config) == []
    assert all(text.startswith("C++ for portable, as LORAPLEX_ISA says") for text in shown)
