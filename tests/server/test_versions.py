"""What other versions of the server have written: their caches, and records of training jobs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from loraplex_model.checkpoints import cache
from loraplex_server.training.jobs import JobOrder, JobRecord
from loraplex_server.training.records import RECORD, Records

ID = "0123456789ab-01234567"


@pytest.fixture
def records(tmp_path: Path) -> Records:
    found = Records(tmp_path / "jobs")
    assert found.acquire()
    found.make(ID)
    found.save(JobRecord(id=ID, order=JobOrder(name="a"), ending="done"))
    return found


def test_fields_of_a_newer_version_do_not_keep_a_job_from_being_read(records: Records) -> None:
    file = records.folder(ID) / RECORD
    newer = json.loads(file.read_text()) | {"colour": "red", "nested": {"a": [1]}}
    newer["order"]["tenant"] = "search"
    file.write_text(json.dumps(newer))
    (job,) = records.load()
    assert (job.order.name, job.ending) == ("a", "done")
    # They are lost when this version writes the record, as docs/upgrades.md says.
    records.save(job)
    assert "colour" not in json.loads(file.read_text())


@pytest.mark.parametrize(
    "change", [{"state": "paused"}, {"error": {"reason": "NEW_REASON", "message": "x"}}]
)
def test_a_job_in_a_state_of_a_newer_version_is_left_to_it(
    change: dict[str, object], records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    file = records.folder(ID) / RECORD
    newer = json.dumps(json.loads(file.read_text()) | change)
    file.write_text(newer)
    with caplog.at_level(logging.ERROR):
        assert records.load() == []
    assert ID in caplog.text
    assert file.read_text() == newer


@pytest.mark.parametrize("other", [cache.FORMAT - 1, cache.FORMAT + 1])
def test_entries_of_other_versions_of_the_cache_are_neither_used_nor_removed(
    other: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    built: list[int] = []

    def build(folder: Path) -> None:
        built.append(cache.FORMAT)
        (folder / "made").write_text(str(cache.FORMAT))

    def entry() -> Path:
        return cache.entry_for(tmp_path / "cache", [tmp_path / "model.bin"], build)

    ours = entry()
    with monkeypatch.context() as patch:
        patch.setattr(cache, "FORMAT", other)
        theirs = entry()
        assert entry() == theirs != ours
    assert entry() == ours
    assert built == [cache.FORMAT, other]
    assert (theirs / "made").read_text() == str(other)
