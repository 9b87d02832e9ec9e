"""A server that trains, as a process: what its end and its next start do to a trainer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
from loraplex.v1 import training_pb2 as pb
from loraplex.v1 import training_pb2_grpc
from rpc.harness import write_adapter
from rpc.training_jobs import State, alive, jobs_dir, order, settings
from server.test_process import serving, start, write_config


def stub(up: object) -> training_pb2_grpc.TrainingServiceStub:
    return training_pb2_grpc.TrainingServiceStub(grpc.insecure_channel(up.grpc))


def wait_for(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.01)


def trainer_of(folder: Path) -> int:
    """The pid of the trainer that was started last."""
    text = next(jobs_dir(folder).glob("*-*")).joinpath("calls").read_text()
    return int(text.splitlines()[-1].split()[1])


def test_a_trainer_dies_with_a_killed_server_and_goes_on_with_the_next(tmp_path: Path) -> None:
    more = settings(tmp_path)
    made = write_adapter(tmp_path / "made")
    with serving(tmp_path, **more) as up:
        job = stub(up).CreateJob(order("step 2", "hold", "step 4", f"publish {made}")).job
        request = pb.GetJobRequest(job_id=job.job_id)
        wait_for(lambda: stub(up).GetJob(request).job.progress.saved_step == 2)
        pid = trainer_of(tmp_path)
        assert alive(pid)
        up.process.kill()
        up.wait()
        wait_for(lambda: not alive(pid))
    (jobs_dir(tmp_path) / job.job_id / "release").touch()
    with serving(tmp_path, **more) as up:
        *_, last = stub(up).WatchJob(pb.WatchJobRequest(job_id=job.job_id))
        assert last.job.state == State.TRAINING_JOB_STATE_SUCCEEDED, last.job.error
        assert (last.job.resumptions, last.job.progress.step) == (1, 4)
        # And a good end lets it save.
        second = stub(up).CreateJob(order("step 3", "hold", name="second")).job
        request = pb.GetJobRequest(job_id=second.job_id)
        wait_for(lambda: stub(up).GetJob(request).job.progress.saved_step == 3)
        up.process.send_signal(signal.SIGTERM)
        assert up.wait() == 0
    folder = jobs_dir(tmp_path) / second.job_id
    assert "interrupted" in (folder / "trainer.log").read_text()
    record = json.loads((folder / "job.json").read_text())
    assert (record["state"], record["progress"]["saved_step"]) == ("interrupted", 3)
    assert "resumptions" not in record or record["resumptions"] == 0


def test_a_killed_server_keeps_whole_files_and_no_halves(tmp_path: Path) -> None:
    more = settings(tmp_path)
    part = pb.UploadDataRequest
    files = jobs_dir(tmp_path) / "files"
    done = threading.Event()

    def half() -> Iterator[pb.UploadDataRequest]:
        yield part(start={"filename": "half"})
        yield part(chunk=b"half")
        done.wait(60)

    with serving(tmp_path, **more) as up:
        whole = iter([part(start={"filename": "whole"}), part(chunk=b"whole")])
        file = stub(up).UploadData(whole).file
        call = stub(up).UploadData.future(half())
        wait_for(lambda: len(list(files.iterdir())) == 2)
        up.process.kill()
        up.wait()
        done.set()
        assert call.exception() is not None
        assert len(list(files.iterdir())) == 2
    with serving(tmp_path, **more) as up:
        assert list(stub(up).ListData(pb.ListDataRequest()).files) == [file]
        pieces = stub(up).ReadData(pb.ReadDataRequest(data_id=file.data_id))
        assert b"".join(piece.chunk for piece in pieces) == b"whole"
        assert [path.name for path in files.iterdir()] == [file.data_id]


def test_a_folder_of_jobs_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    more = {**settings(tmp_path), "training_jobs_dir": tmp_path / "file" / "jobs"}
    process = start(write_config(tmp_path, **more))
    _, errors = process.communicate()
    assert process.returncode == 5
    assert errors.strip().splitlines()[-1].startswith("error: cannot use ")


def test_an_orphan_does_not_start(tmp_path: Path) -> None:
    from loraplex_server.training import launch

    command = [sys.executable, launch.__file__, "1", "0", "touch", str(tmp_path / "started")]
    assert subprocess.run(command, check=False).returncode == launch.ORPHANED
    assert not (tmp_path / "started").exists()
