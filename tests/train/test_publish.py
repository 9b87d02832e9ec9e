"""Hand-over: what is served is what was trained, or nothing is."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from client.fake_server import FakeServer, failure
from loraplex import AdapterState, Client
from loraplex_adapters.store import Store
from loraplex_model.adapters.delta import AdapterDelta
from loraplex_model.base.refusal import Refusal
from loraplex_training import session
from loraplex_training.publish import publish as publishing
from loraplex_training.publish import verify
from loraplex_training.publish.publish import publish
from loraplex_training.publish.target import Target
from loraplex_training.report.record import RunRecord
from loraplex_training.run.generate import Generator
from loraplex_training.run.run import Run
from loraplex_training.step.job import Job
from safetensors import safe_open

from train import commands, runs, tiny

METHODS: dict[str, dict[str, object]] = {
    "lora": {},
    "dora": {"r": 2},
    "ia3": {"target_modules": "k_proj,v_proj,down_proj"},
    "prompt_tuning": {"num_virtual_tokens": 3, "init": "random"},
    "prefix_tuning": {"num_virtual_tokens": 3, "init": "random"},
    "bitfit": {"target_modules": "q_proj,v_proj"},
}


@dataclass
class Trained:
    run: Run
    outcomes: dict[str, Job]

    def publish(self, job: str = "lora", alias: str = "", **target: Any) -> Any:
        return publish(self.outcomes[job], self.run, Target(**target), alias)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """One job of each method, after two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAPLEX_KERNELS_DIR", str(commands.KERNELS))
        top = tmp_path_factory.mktemp("publish")
        runs.write_base(top)
        data = runs.write_data(top / runs.DATA)
        jobs = []
        for method, options in METHODS.items():
            one = runs.job(method.replace("_", "-"), data, method=method, steps=2, eval_every=2)
            jobs.append(replace(one, method=replace(one.method, options=options)))
        spec = runs.spec(top, "run", *jobs)
        run = Run.start(spec, [RunRecord(spec.out)])
        yield Trained(run, dict(run.train()))


def folder(trained: Trained, job: str = "lora") -> Path:
    return Path(trained.run.spec.out / job / publishing.FOLDER)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_served_as_it_was_trained_and_peft_agrees(
    trained: Trained, method: str
) -> None:
    job = method.replace("_", "-")
    done = trained.publish(job)
    assert done.path == folder(trained, job)
    with torch.no_grad():
        delta = trained.outcomes[job].adapter.delta()
    expected = trained.run.joint.logits(delta, tiny.PROMPT)
    opened = tiny.opened_by_us(done.path)
    served = Generator(trained.run.base.weights, trained.run.spec.cache).logits(opened, tiny.PROMPT)
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-4)
    if method != "bitfit":  # PEFT's own class for it names the biases otherwise
        theirs = tiny.their_logits(tiny.opened_by_peft(done.path))
        torch.testing.assert_close(served, theirs, rtol=1e-4, atol=1e-4)


def test_the_file_says_what_it_was_made_of_and_peft_is_not_bothered(trained: Trained) -> None:
    done = trained.publish()
    with safe_open(done.path / "adapter_model.safetensors", "pt") as file:
        stamps = file.metadata()
    assert stamps["loraplex_base_fingerprint"] == trained.run.base.weights.fingerprint
    assert stamps["loraplex_quantisation"] == "nf4 double 64"
    assert stamps["loraplex_data_sha256"] == trained.run.datasets["lora"].digest
    assert stamps["loraplex_trainer"].startswith("loraplex ")
    config = json.loads((done.path / "adapter_config.json").read_text())
    assert not [key for key in config if key.startswith("loraplex")]
    assert str(trained.run.spec.out.parent) not in json.dumps(config)  # no paths of this machine


def test_the_same_adapter_is_the_same_bytes(trained: Trained) -> None:
    first = trained.publish().digest
    assert trained.publish().digest == first
    coarse = trained.publish(dtype="bfloat16")
    assert coarse.digest != first
    with safe_open(coarse.path / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_the_store_gets_a_new_version_with_alias_and_labels(
    trained: Trained, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    labels = {"team": "a"}
    first = trained.publish(store=store, alias="best", labels=labels)
    second = trained.publish("dora", store=store, alias="best")
    assert (first.version, second.version) == ("lora@1", "dora@1")
    with Store(store) as opened:
        assert opened.resolve("best").digest == second.digest
        assert opened.resolve("lora").labels == labels
        assert opened.resolve("lora").provenance["quantisation"] == "nf4 double 64"
        assert opened.resolve("lora").base_fingerprint == trained.run.base.weights.fingerprint
        opened.verify(first.digest)


def test_a_server_that_would_say_something_else_gets_nothing(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = Generator.logits

    def off(self: Generator, delta: AdapterDelta | None, ids: Any) -> torch.Tensor:
        found = logits(self, delta, ids).clone()
        if delta is not None:
            found[-1, found[-1].argmax()] += 3e-3
        return found

    monkeypatch.setattr(Generator, "logits", off)
    before = folder(trained, "ia3")
    with pytest.raises(Refusal, match="differ from the trainer's by") as caught:
        trained.publish("ia3", store=tmp_path / "store")
    assert caught.value.reason == "PUBLISH_FAILED"
    assert not (tmp_path / "store").exists()
    assert not [p for p in before.parent.iterdir() if p.name != publishing.FOLDER]


@pytest.mark.parametrize("spoil", ["zero", "drop", "nan"])
def test_a_file_that_holds_something_else_is_not_published(
    trained: Trained, spoil: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = trained.outcomes["lora"]
    files = outcome.adapter.files()
    tensors = dict(files.tensors)
    name = next(name for name in tensors if "lora_B" in name)
    if spoil == "drop":
        del tensors[name]
    else:
        tensors[name] = torch.full_like(tensors[name], 0.0 if spoil == "zero" else torch.nan)
    adapter = outcome.adapter
    monkeypatch.setattr(adapter, "files", lambda: replace(files, tensors=tensors))
    with pytest.raises(Refusal) as caught:
        trained.publish()
    assert caught.value.reason == "PUBLISH_FAILED"


def test_a_full_disk_leaves_no_half_written_folder_and_the_old_one_whole(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = trained.publish()
    kept = {path.name: path.read_bytes() for path in old.path.iterdir()}
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if "adapter_model" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refusal, match="make room") as caught:
        trained.publish(dtype="bfloat16")
    assert caught.value.reason == "DISK_FULL"
    assert {path.name: path.read_bytes() for path in old.path.iterdir()} == kept
    assert [path.name for path in old.path.parent.iterdir()] == [publishing.FOLDER]


def test_a_store_that_cannot_be_written_is_said_and_the_folder_stays(
    trained: Trained, tmp_path: Path
) -> None:
    (tmp_path / "store").write_text("in the way")
    with pytest.raises(Refusal, match="is complete, but not in the store") as caught:
        trained.publish(store=tmp_path / "store")
    assert caught.value.reason == "PUBLISH_FAILED"
    assert (folder(trained) / "adapter_config.json").is_file()


def test_a_server_that_is_not_there_is_said_with_the_command_that_sends_it_later(
    trained: Trained,
) -> None:
    with pytest.raises(Refusal) as caught:
        trained.publish(server="127.0.0.1:9")
    assert caught.value.reason == "PUBLISH_FAILED"
    (problem,) = caught.value.messages
    command = problem.partition("upload it again with: ")[2]
    assert "--server 127.0.0.1:9 adapters upload lora" in command
    assert commands.is_known(command)


def test_a_wrong_address_or_key_shows_before_the_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LORAPLEX_KEY", raising=False)
    server = FakeServer()
    server.start()
    assert session._trouble(server.target) == ""
    server.failures = [failure(grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_MISSING")]
    assert "LORAPLEX_KEY_FILE" in session._trouble(server.target)
    server.failures = [failure(grpc.StatusCode.UNIMPLEMENTED, "")]
    assert session._trouble(server.target) == "", "an older server"
    server.stop()
    assert session._trouble(server.target) == f"no server answers at {server.target} now"
    monkeypatch.setenv("LORAPLEX_KEY", "lpx_a_b")
    assert "would not be encrypted" in session._trouble("example.com:50051")


def test_a_server_takes_the_adapter_and_answers_as_the_trainer_does(
    trained: Trained, tmp_path: Path
) -> None:
    run = trained.run
    settings = {
        "model": run.spec.model, "cache": run.spec.cache, "store": tmp_path / "store",
        "dtype": "float32", "threads": 1, "kv_tokens": 1024, "device": "cpu",
    }  # fmt: skip
    outcome = trained.outcomes["lora"]
    with commands.server(settings, tmp_path / "server.log") as server:
        done = trained.publish(server=server.address, alias="best", labels={"team": "a"})
        with Client(server.address) as client:
            info = client.get_adapter("best")
    assert (done.version, done.server) == ("lora@1", server.address)
    assert (info.digest, info.state, info.labels) == (
        done.digest, AdapterState.RESIDENT, {"team": "a"},
    )  # fmt: skip
    example = run.datasets["lora"].evaluation[0]
    with torch.no_grad():
        delta = outcome.adapter.delta()
    (expected,) = Generator(run.base.weights, run.spec.cache).answers(
        delta, [example.tokens[: example.prompt]], publishing.SAMPLE_TOKENS, run.text.eos_ids
    )
    assert done.sample == run.text.decode(expected)
    assert done.sample


def test_a_bfloat16_base_is_verified_as_strictly(trained: Trained) -> None:
    base = trained.run.base.weights
    narrow = replace(base, embed=base.embed.bfloat16(), norm=base.norm.bfloat16())
    wide = verify.in_float32(narrow)
    assert wide.embed.dtype == wide.norm.dtype == torch.float32
    assert verify.in_float32(base) is base


def test_a_base_is_called_what_others_call_it(tmp_path: Path) -> None:
    (tmp_path / "my-base").mkdir()
    assert publishing.known_as(str(tmp_path / "my-base")) == "my-base"
    assert publishing.known_as("org/base-1") == "org/base-1"
    assert publishing.known_as("default") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.fault("base-cache-cut-short")
def test_what_was_trained_while_the_base_changed_on_the_disk_is_not_published(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = trained.run.base.file
    monkeypatch.setattr(type(file), "is_intact", lambda self: self is not file)
    store = tmp_path / "store"
    with pytest.raises(Refusal, match="nothing was registered") as refused:
        trained.publish(store=store)
    assert refused.value.reason == "PUBLISH_FAILED"
    assert not store.exists()
