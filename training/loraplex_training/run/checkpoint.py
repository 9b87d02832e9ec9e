"""A run on the disk: its options, and checkpoints from which it resumes bit for bit.

    <out>/config.toml                   the run's options, written first
    <out>/lock                          held by the process that trains
    <out>/checkpoints/000007/           complete, or absent
        state.json                      counters, losses, schedules; `RunSnapshot.values`
        <job>.safetensors               parameters, optimiser, best; `RunSnapshot.tensors`
        SHA256SUMS                      of these files, for `sha256sum -c`
    <out>/checkpoints/.new-000008/      unfinished, or left by a crash

A checkpoint is written under a temporary name, flushed to the disk and renamed. Older ones are
removed only after that, so a crash at any moment leaves the last complete checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loraplex_model.base.durable import (
    flush,
    is_disk_full,
    is_shortage,
    lock,
    make_directory,
    write_atomically,
)
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason, Refusal
from loraplex_model.checkpoints.safetensors_file import SafetensorsFile
from safetensors import SafetensorError
from safetensors.torch import load_file

CONFIG = "config.toml"
FOLDER = "checkpoints"
_STATE, _SUMS, _TENSORS = "state.json", "SHA256SUMS", ".safetensors"
_NEW = ".new-"


@dataclass(frozen=True, slots=True)
class RunSnapshot:
    """The whole state of a run at one moment.

    Attributes:
        values: JSON values. Floats are restored bit for bit, infinities and NaN included.
        tensors: tensors of any dtype, by job and name; on the CPU when restored.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, torch.Tensor]]


class RunFolder:
    """The directory of a run that this process trains. It is locked until `close`.

    Attributes:
        keep: number of checkpoints to keep.
        notices: sentences about damaged checkpoints that were skipped.
    """

    def __init__(self, out: Path, keep: int = 2) -> None:
        """Makes the directory if needed. Raises Refusal: BUSY, DISK_FULL, CONFIG_INVALID."""
        self.out = out
        self.keep = keep
        self.notices: list[str] = []
        self._damaged: set[int] = set()
        with _on_disk(out):
            reach("train.folder.make")
            make_directory(out / FOLDER)
            try:
                self._lock = lock(out / "lock", wait=False)
            except BlockingIOError:
                raise Refusal(Reason.BUSY, f"another process trains in {out}") from None

    def close(self) -> None:
        """Unlocks the directory. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def write_config(self, text: str) -> None:
        """Writes the run's options atomically."""
        with _on_disk(self.out):
            reach("train.config.write")
            write_atomically(self.out / CONFIG, text.encode())
            try:
                reach("train.config.flush")
                flush(self.out)
            except BaseException:
                # A directory with options is a run; one that could not be started is none.
                (self.out / CONFIG).unlink(missing_ok=True)
                raise

    def save(self, snapshot: RunSnapshot) -> Path:
        """Writes a checkpoint, removes older ones beyond `keep`, and returns the new one's path.

        Raises Refusal(DISK_FULL). The previous checkpoint then remains, and nothing of the new one.
        """
        serials = self._serials()
        serial = max(serials, default=0) + 1
        place = self.out / FOLDER / f"{serial:06}"
        fresh = self.out / FOLDER / f"{_NEW}{serial:06}"
        try:
            with _on_disk(self.out):
                for left in (self.out / FOLDER).glob(f"{_NEW}*"):  # by a crash
                    shutil.rmtree(left)
                reach("train.checkpoint.make")
                fresh.mkdir()
                _fill(fresh, snapshot)
                reach("train.checkpoint.sync-directory")
                flush(fresh)
                reach("train.checkpoint.rename")
                fresh.rename(place)
                reach("train.checkpoint.flush")
                flush(place.parent)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        sound = [one for one in serials if one not in self._damaged]
        kept = sound[len(sound) - self.keep + 1 :] if self.keep > 1 else []
        with _on_disk(self.out):
            for old in serials:
                if old not in kept:
                    reach("train.checkpoint.prune")
                    # First the sums: without them, what a crash leaves is not a checkpoint.
                    (self.out / FOLDER / f"{old:06}" / _SUMS).unlink(missing_ok=True)
                    shutil.rmtree(self.out / FOLDER / f"{old:06}", ignore_errors=True)
        reach("train.checkpoint.done")
        return place

    def newest(self) -> RunSnapshot | None:
        """Reads the newest undamaged checkpoint; returns None if there are no checkpoints yet.

        Damaged ones are skipped and noted. Raises Refusal: CHECKPOINT_INVALID (all are damaged),
        CONFIG_INVALID (no file descriptor or memory is free).
        """
        serials = self._serials()
        problems = []
        for serial in reversed(serials):
            place = self.out / FOLDER / f"{serial:06}"
            try:
                snapshot = _read(place)
            except (OSError, ValueError, SafetensorError) as error:
                if is_shortage(error):
                    text = f"checkpoint {place} cannot be read now: {error}"
                    raise Refusal(Reason.CONFIG_INVALID, text) from error
                self._damaged.add(serial)
                problems.append(f"checkpoint {place} is damaged: {error}")
                continue
            self.notices += [f"{problem}; continuing from an earlier one" for problem in problems]
            return snapshot
        if problems:
            problems.append("there is no other checkpoint; start a new run")
            raise Refusal.listing(Reason.CHECKPOINT_INVALID, problems)
        return None

    def _serials(self) -> list[int]:
        """Returns the numbers of all checkpoints, oldest first."""
        names = [path.name for path in (self.out / FOLDER).iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())


def is_run(folder: Path) -> bool:
    """Returns whether the directory holds a run."""
    return (folder / CONFIG).is_file()


def _fill(folder: Path, snapshot: RunSnapshot) -> None:
    sums = {}
    for job, tensors in snapshot.tensors.items():
        path = folder / f"{job}{_TENSORS}"
        reach("train.checkpoint.tensors")
        with SafetensorsFile(path, len(tensors), {}) as file:
            for name, tensor in tensors.items():
                file.add(name, tensor.detach().cpu())
        reach("train.checkpoint.sync")
        sums[path.name] = _sync(path)
    state = folder / _STATE
    reach("train.checkpoint.state")
    state.write_text(json.dumps(snapshot.values, indent=1) + "\n", "utf-8")
    sums[_STATE] = _sync(state)
    listed = folder / _SUMS
    reach("train.checkpoint.sums")
    listed.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), "utf-8")
    _sync(listed)


def _read(folder: Path) -> RunSnapshot:
    """Reads a checkpoint. Raises OSError, ValueError or SafetensorError if it is damaged."""
    tensors = {}
    for line in (folder / _SUMS).read_text("utf-8").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / Path(name).name
        if _digest(path) != digest:
            raise ValueError(f"the SHA-256 of {path.name} is wrong")
        if name.endswith(_TENSORS):
            tensors[name.removesuffix(_TENSORS)] = load_file(path)
    return RunSnapshot(json.loads((folder / _STATE).read_text("utf-8")), tensors)


def _sync(path: Path) -> str:
    """Flushes a file to the disk; returns its SHA-256 (hex)."""
    flush(path)
    return _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _on_disk(out: Path) -> Iterator[None]:
    """Turns the operating system's errors about the run's directory into Refusal."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise Refusal(
                Reason.DISK_FULL,
                f"the disk of {out} is full; its last checkpoint is complete: make room, then "
                "resume the run",
            ) from error
        raise Refusal(
            Reason.CONFIG_INVALID, f"{out} cannot be written: {error.strerror}"
        ) from error
