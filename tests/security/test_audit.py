"""The audit log: a line for whoever changes something or is refused, whatever the disk does."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
from loraplex.v1 import adapter_pb2 as pb
from loraplex.v1 import training_pb2, training_pb2_grpc
from loraplex_server.access.audit_log import file as audit_file
from loraplex_server.access.audit_log.file import AuditFile
from loraplex_server.access.audit_log.lines import (
    REFUSALS_PER_SECOND,
    AuditEntry,
    AuditLog,
    LoggedAudit,
)
from loraplex_server.access.roles import Role
from loraplex_server.metrics import Metrics
from prometheus_client import CollectorRegistry
from rpc.harness import ask, running, until, write_adapter
from rpc.training_jobs import order, settings
from security.callers import OPS, Callers, audited, code_of, guarded, key, principal, register

SECRET = "canary-9c1e"


def fresh() -> Metrics:
    return Metrics(CollectorRegistry())


def lines_of(metrics: Metrics, result: str) -> float:
    value = metrics.registry.get_sample_value("loraplex_audit_lines_total", {"result": result})
    assert value is not None
    return value


def entry(**changes: Any) -> AuditEntry:
    fields = {
        "method": "/loraplex.v1.AdapterService/DeleteAdapter",
        "principal": OPS,
        "peer": "127.0.0.1",
        "request_id": "r",
        "code": "OK",
        "reason": "",
        "why": "",
        "seconds": 0.25,
        "about": {"adapter": "a"},
    }
    return AuditEntry(**{**fields, **changes})


# through a server


async def test_every_managing_call_has_one_line_that_says_who_what_and_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, who = tmp_path / "audit.jsonl", {"metadata": key(OPS)}
    async with guarded(tmp_path, monkeypatch, Callers(principal(OPS))) as up:
        first = await register(up, OPS, "alpha", 1, labels={"team": "search"}, load=True)
        second = await register(up, OPS, "alpha", 2, replace=True)
        call = up.adapters
        await call.SetAlias(pb.SetAliasRequest(alias="live", adapter_id="alpha@1"), **who)
        label = pb.LabelAdapterRequest(adapter_id="live", set={"team": "b"}, remove=["old"])
        await call.LabelAdapter(label, **who)
        await call.PinAdapter(pb.PinAdapterRequest(adapter_id="alpha@1"), **who)
        await call.UnpinAdapter(pb.UnpinAdapterRequest(adapter_id="alpha@1"), **who)
        upload = await call.StartUpload(pb.StartUploadRequest(), **who)
        await call.AbortUpload(pb.AbortUploadRequest(upload_id=upload.upload_id), **who)
        await call.DeleteAlias(pb.DeleteAliasRequest(alias="live"), **who)
        delete = pb.DeleteAdapterRequest(name="unknown")
        assert await code_of(call.DeleteAdapter(delete, **who)) is grpc.StatusCode.NOT_FOUND
        # These change nothing.
        await up.generation.Generate(ask(adapter="alpha", new=1), **who)
        await call.GetAdapter(pb.GetAdapterRequest(adapter_id="alpha"), **who)
        await call.ListAdapters(pb.ListAdaptersRequest(), **who)
    lines = audited(file)
    common = {"principal": OPS, "peer": "127.0.0.1", "code": "OK"}
    for line in lines:
        assert {name: line[name] for name in common} == {**common, "code": line["code"]}
        assert line["request_id"]
        assert line["seconds"] >= 0
        assert line["time"].endswith("+00:00")
    told = [
        {k: v for k, v in line.items() if k not in {*common, "request_id", "seconds", "time"}}
        for line in lines
    ]
    alpha1 = {"adapter": "alpha", "version": 1, "digest": first.digest}
    assert told == [
        {"method": "RegisterAdapter", **alpha1, "labels": {"team": "search"}},
        {"method": "RegisterAdapter", "adapter": "alpha", "version": 2, "digest": second.digest},
        {"method": "SetAlias", "alias": "live", "adapter_id": "alpha@1", **alpha1},
        {
            "method": "LabelAdapter",
            "adapter_id": "live",
            "labels": {"team": "b"},
            "removed_labels": ["old"],
            **alpha1,
        },
        {"method": "PinAdapter", "adapter_id": "alpha@1", **alpha1},
        {"method": "UnpinAdapter", "adapter_id": "alpha@1", **alpha1},
        {"method": "StartUpload", "upload_id": upload.upload_id},
        {"method": "AbortUpload", "upload_id": upload.upload_id},
        {"method": "DeleteAlias", "alias": "live"},
        {"method": "DeleteAdapter", "adapter": "unknown", "reason": "ADAPTER_NOT_FOUND"},
    ]
    assert lines[-1]["code"] == "NOT_FOUND"


async def test_uploads_and_jobs_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    who = {"metadata": key(OPS)}
    callers = Callers(principal(OPS))
    async with guarded(tmp_path, monkeypatch, callers, **settings(tmp_path)) as up:
        folder = write_adapter(tmp_path / "made", 5)
        config = (folder / "adapter_config.json").read_bytes()
        weights = (folder / "adapter_model.safetensors").read_bytes()
        upload = await up.adapters.StartUpload(pb.StartUploadRequest(), **who)
        header = pb.UploadHeader(
            upload_id=upload.upload_id,
            name="beta",
            config_size=len(config),
            weights_size=len(weights),
        )
        chunks = [
            pb.UploadChunk(file=pb.ADAPTER_FILE_CONFIG, data=config),
            pb.UploadChunk(file=pb.ADAPTER_FILE_WEIGHTS, data=weights),
        ]
        parts = [pb.UploadAdapterRequest(header=header)]
        parts += [pb.UploadAdapterRequest(chunk=chunk) for chunk in chunks]
        reply = await up.adapters.UploadAdapter(iter(parts), **who)
        training = training_pb2_grpc.TrainingServiceStub(up.channel)
        made = await training.CreateJob(order("hold", name="gamma"), **who)
        cancel = training_pb2.CancelJobRequest(job_id=made.job.job_id)
        await training.CancelJob(cancel, **who)
    begun, uploaded, created, cancelled = audited(tmp_path / "audit.jsonl")
    assert begun["upload_id"] == uploaded["upload_id"] == upload.upload_id
    assert (uploaded["adapter"], uploaded["digest"]) == ("beta", reply.adapter.digest)
    assert (created["method"], created["adapter"]) == ("CreateJob", "gamma")
    assert created["job_id"] == cancelled["job_id"] == made.job.job_id


async def test_refused_callers_are_recorded_with_the_cause_that_they_are_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = Callers(principal("reader", [Role.READ]))
    async with guarded(tmp_path, monkeypatch, callers) as up:
        await code_of(up.generation.Generate(ask()))
        await code_of(up.generation.Generate(ask(), metadata=key("mallory")))
        await code_of(up.generation.Generate(ask(), metadata=key("reader")))
        delete = up.adapters.DeleteAdapter(
            pb.DeleteAdapterRequest(name="alpha"), metadata=key("reader")
        )
        await code_of(delete)
    lines = audited(tmp_path / "audit.jsonl")
    assert [(line.get("principal"), line["method"], line["reason"]) for line in lines] == [
        (None, "Generate", "CREDENTIALS_MISSING"),
        (None, "Generate", "CREDENTIALS_INVALID"),
        ("reader", "Generate", "PERMISSION_DENIED"),
        ("reader", "DeleteAdapter", "PERMISSION_DENIED"),
    ]
    assert lines[1]["why"] == "a name that is unknown"
    assert "adapter" not in lines[3]  # nothing of the request was read


async def test_no_secret_prompt_template_or_path_and_no_forged_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "audit.jsonl"
    names = ['x"\n{"forged": 1}', "\u2028\u0085\x00\x1b[2J", "é" * 10_000, "😀" * 300, ""]
    callers = Callers(principal(OPS), principal(f"key-{SECRET}", []))
    async with guarded(tmp_path, monkeypatch, callers) as up:
        for name in names:
            request = pb.RegisterAdapterRequest(
                name=name,
                path=f"/{SECRET}/{name}"[:4000],
                chat_template=f"{{{{ '{SECRET}' }}}}",
                labels={name[:300]: name[:300]},
            )
            await code_of(up.adapters.RegisterAdapter(request, metadata=key(OPS)))
        await code_of(up.generation.Generate(ask(), metadata=key(f"key-{SECRET}-wrong")))
        await code_of(
            up.generation.Generate(
                ask(request_id=f"id-{names[0]!r}"[:20]), metadata=key(f"wrong-{SECRET}")
            )
        )
    text = file.read_bytes()
    assert SECRET.encode() not in text
    assert text.isascii()
    lines = audited(file)
    assert len(lines) == len(names) + 2
    assert [line.get("adapter", "") for line in lines[: len(names)]] == [n[:256] for n in names]
    assert SECRET not in caplog.text


async def test_a_flood_of_refusals_is_counted_in_a_few_lines_and_hides_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callers = Callers(principal(OPS), principal("reader", [Role.READ]))
    async with guarded(tmp_path, monkeypatch, callers) as up:
        other = [
            asyncio.create_task(code_of(up.generation.Generate(ask(), metadata=key("reader")))),
            asyncio.create_task(register(up, OPS, "alpha")),
        ]
        for _ in range(3):
            calls = [up.generation.Generate(ask(), metadata=key("m")) for _ in range(100)]
            codes = await asyncio.gather(*map(code_of, calls))
            assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED}
        await asyncio.gather(*other)
        metrics = up.server.metrics
    lines = audited(tmp_path / "audit.jsonl")
    invalid = [line for line in lines if line.get("reason") == "CREDENTIALS_INVALID"]
    shown = [line for line in invalid if "method" in line]
    left_out = sum(line.get("refusals_left_out", 0) for line in invalid)
    assert len(shown) + left_out == 300
    assert REFUSALS_PER_SECOND <= len(shown) < 300 / 2
    assert lines_of(metrics, "left_out") == left_out
    assert {"RegisterAdapter", "Generate"} == {
        line["method"] for line in lines if line.get("principal")
    }


async def test_without_a_file_the_lines_go_to_the_log_whatever_its_level(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "loraplex.audit")
    async with running(tmp_path) as up:
        await up.register("alpha")
    (record,) = [record for record in caplog.records if record.name == "loraplex.audit"]
    assert (record.method, record.adapter, record.code) == ("RegisterAdapter", "alpha", "OK")


# the file


def content(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def wait_for(metrics: Metrics, result: str, count: int) -> None:
    done = threading.Event()
    while lines_of(metrics, result) < count:
        done.wait(0.002)


def test_the_file_is_private_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for number in range(3):
        audit = AuditFile(path, fresh())
        audit.write({"number": number})
        audit.close()
    assert [line["number"] for line in content(path)] == [0, 1, 2]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("change", ["renamed", "removed", "replaced", "emptied"])
def test_a_file_that_is_rotated_is_followed(tmp_path: Path, change: str) -> None:
    path, old, metrics = tmp_path / "audit.jsonl", tmp_path / "audit.1", fresh()
    audit = AuditFile(path, metrics)
    audit.write({"number": 0})
    wait_for(metrics, "written", 1)
    match change:
        case "renamed":
            path.rename(old)
        case "removed":
            path.unlink()
        case "replaced":
            (tmp_path / "new").touch()
            (tmp_path / "new").rename(path)
        case "emptied":
            os.truncate(path, 0)
    audit.write({"number": 1})
    audit.close()
    assert [line["number"] for line in content(path)] == [1]
    if change == "renamed":
        assert [line["number"] for line in content(old)] == [0]


def test_a_torn_last_line_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"number": 0}\n{"numb')
    audit = AuditFile(path, fresh())
    audit.write({"number": 1})
    audit.close()
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["number"] for line in whole] == [0, 1]


def test_a_line_that_is_written_in_part_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, metrics, real = tmp_path / "audit.jsonl", fresh(), os.write
    sizes = iter([5, -1, 3, 1 << 20])  # bytes of each write; -1 fails

    def write(number: int, data: bytes) -> int:
        size = next(sizes, 1 << 20)
        if size < 0:
            raise OSError(28, "No space left on device")
        return real(number, data[:size])

    monkeypatch.setattr(audit_file.os, "write", write)
    audit = AuditFile(path, metrics)
    for number in range(3):
        audit.write({"number": number})
    audit.close()
    lines = path.read_text().splitlines()
    assert len(lines[0]) == 5
    told = [json.loads(line) for line in lines[1:]]
    assert [line.get("number") for line in told] == [None, 1, 2]
    assert told[0]["lines_lost"] == 1
    assert (lines_of(metrics, "lost"), lines_of(metrics, "written")) == (1, 2)


def test_a_full_disk_is_logged_once_counted_and_reported_when_it_is_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, metrics = tmp_path / "audit.jsonl", fresh()
    path.symlink_to("/dev/full")
    audit = AuditFile(path, metrics)
    for number in range(20):
        audit.write({"number": number})
    wait_for(metrics, "lost", 20)
    path.unlink()
    audit.write({"number": 20})
    audit.close()
    assert [line.get("lines_lost", line.get("number")) for line in content(path)] == [20, 20]
    levels = [record.levelname for record in caplog.records]
    assert levels == ["ERROR", "WARNING"]
    assert "No space left on device" in caplog.text


def test_a_folder_that_is_gone_loses_lines_until_it_is_back(tmp_path: Path) -> None:
    folder, metrics = tmp_path / "logs", fresh()
    folder.mkdir()
    audit = AuditFile(folder / "audit.jsonl", metrics)
    (folder / "audit.jsonl").unlink()
    folder.rmdir()
    audit.write({"number": 0})
    wait_for(metrics, "lost", 1)
    folder.mkdir()
    audit.write({"number": 1})
    audit.close()
    told = content(folder / "audit.jsonl")
    assert [line.get("lines_lost", line.get("number")) for line in told] == [1, 1]


def test_a_disk_that_hangs_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(audit_file, "MAX_QUEUED", 8)
    monkeypatch.setattr(audit_file, "CLOSE_SECONDS", 0.05)
    metrics, goes_on, hangs = fresh(), threading.Event(), threading.Event()
    real = os.write

    def write(number: int, data: bytes) -> int:
        hangs.set()
        goes_on.wait()
        return real(number, data)

    monkeypatch.setattr(audit_file.os, "write", write)
    audit = AuditFile(tmp_path / "audit.jsonl", metrics)
    audit.write({"number": 0})
    hangs.wait()
    for number in range(1, 30):
        audit.write({"number": number})
    assert lines_of(metrics, "lost") == 29 - 8
    audit.close()
    goes_on.set()
    wait_for(metrics, "written", 9)
    assert "too many lines wait for the disk" in caplog.text


def test_a_pipe_that_nobody_reads_holds_up_nobody(tmp_path: Path) -> None:
    path, metrics = tmp_path / "pipe", fresh()
    os.mkfifo(path)
    audit = AuditFile(path, metrics)
    for _ in range(1000):
        audit.write({"text": "x" * 1000})
    audit.close()
    assert lines_of(metrics, "lost") > 0
    assert lines_of(metrics, "lost") + lines_of(metrics, "written") == 1000


def test_a_path_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing" / "audit.jsonl"):
        with pytest.raises(OSError, match=str(tmp_path)):
            AuditFile(path, fresh())


# the lines


async def test_each_reason_has_its_own_room_and_the_rest_is_counted() -> None:
    told: list[Any] = []

    class Kept:
        def write(self, fields: Any) -> None:
            told.append(fields)

        def close(self) -> None:
            pass

    metrics = fresh()
    log = AuditLog(Kept(), metrics)
    for reason in ("CREDENTIALS_MISSING", "PERMISSION_DENIED"):
        for _ in range(25):
            log.record(entry(reason=reason))
    for _ in range(25):
        log.record(entry(reason="ADAPTER_NOT_FOUND"))
    assert len(told) == 2 * REFUSALS_PER_SECOND + 25
    log.finish()
    assert told[-2:] == [
        {"reason": "CREDENTIALS_MISSING", "refusals_left_out": 25 - REFUSALS_PER_SECOND},
        {"reason": "PERMISSION_DENIED", "refusals_left_out": 25 - REFUSALS_PER_SECOND},
    ]
    log.finish()
    assert len(told) == 2 * REFUSALS_PER_SECOND + 25 + 2
    assert lines_of(metrics, "left_out") == 2 * (25 - REFUSALS_PER_SECOND)


async def test_what_was_left_out_is_said_without_another_refusal() -> None:
    metrics = fresh()
    log = AuditLog(LoggedAudit(metrics), metrics)
    for _ in range(REFUSALS_PER_SECOND + 1):
        log.record(entry(reason="CREDENTIALS_MISSING"))
    await until(lambda: lines_of(metrics, "left_out") == 1)
    log.record(entry(reason="CREDENTIALS_MISSING"))
    assert lines_of(metrics, "written") == REFUSALS_PER_SECOND + 2
