"""A run on the disk: what it was asked to do, and checkpoints from which it goes on to the bit.

    <out>/config.toml                   the run's options, written first
    <out>/lock                          held by the process that trains
    <out>/checkpoints/000007/           whole, or not there
        state.json                      counters, losses, schedules; `Snapshot.values`
        <job>.safetensors               parameters, optimiser, best; `Snapshot.tensors`
        SHA256SUMS                      of the two, for `sha256sum -c`
    <out>/checkpoints/.new-000008/      in the making, or left by a crash

A checkpoint is written under a name of its own, brought to the disk, and renamed. Only then do
older ones go. So whatever moment a process or a disk ends at, the last whole checkpoint is there.
"""

from __future__ import annotations

import errno
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
from loraplex_adapters.convert.export.safetensors_file import SafetensorsFile
from loraplex_adapters.store.disk import flush, try_lock
from loraplex_model.base.faults import reach
from loraplex_model.base.refusal import Reason, Refusal
from safetensors import SafetensorError
from safetensors.torch import load_file

CONFIG = "config.toml"
FOLDER = "checkpoints"
_STATE, _SUMS, _TENSORS = "state.json", "SHA256SUMS", ".safetensors"
_NEW = ".new-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of a run at one moment.

    Attributes:
        values: fit for JSON; floats come back to the bit, infinities and NaN too.
        tensors: by job and name, of any type; on the CPU when they come back.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, torch.Tensor]]


class RunFolder:
    """The folder of a run that this process trains; locked until `close`.

    Attributes:
        notices: sentences on checkpoints that were passed over.
    """

    def __init__(self, out: Path, keep: int = 2) -> None:
        """Makes the folder if there is none. Raises Refusal: BUSY, DISK_FULL, CONFIG_INVALID."""
        self.out = out
        self.keep = keep
        self.notices: list[str] = []
        self._damaged: set[int] = set()
        with _on_disk(out):
            reach("train.folder.make")
            (out / FOLDER).mkdir(parents=True, exist_ok=True)
            try:
                self._lock = try_lock(out / "lock")
            except BlockingIOError:
                raise Refusal(Reason.BUSY, f"another process trains in {out}") from None

    def close(self) -> None:
        """Lets another process have it."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def write_config(self, text: str) -> None:
        """Writes what the run was asked to do, whole or not at all."""
        with _on_disk(self.out):
            fresh = self.out / f".{CONFIG}"
            reach("train.config.write")
            fresh.write_text(text, "utf-8")
            _sync(fresh)
            reach("train.config.rename")
            fresh.rename(self.out / CONFIG)
            flush(self.out)

    def save(self, snapshot: Snapshot) -> Path:
        """Adds a checkpoint and removes those that are not kept.

        Raises Refusal(DISK_FULL); then nothing of it is left, and the one before it is there.
        """
        serials = self._serials()
        serial = max(serials, default=0) + 1
        place = self.out / FOLDER / f"{serial:06}"
        fresh = self.out / FOLDER / f"{_NEW}{serial:06}"
        try:
            with _on_disk(self.out):
                self._clear()
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
                    # its sums first: what a crash leaves of it is then no checkpoint
                    (self.out / FOLDER / f"{old:06}" / _SUMS).unlink(missing_ok=True)
                    shutil.rmtree(self.out / FOLDER / f"{old:06}", ignore_errors=True)
        reach("train.checkpoint.done")
        return place

    def newest(self) -> Snapshot | None:
        """The newest checkpoint that is whole; None if there is none yet.

        Damaged ones are passed over and noted. Raises Refusal(CHECKPOINT_INVALID) if there are
        only damaged ones.
        """
        serials = self._serials()
        problems = []
        for serial in reversed(serials):
            place = self.out / FOLDER / f"{serial:06}"
            try:
                snapshot = _read(place)
            except (OSError, ValueError, SafetensorError) as error:
                self._damaged.add(serial)
                problems.append(f"checkpoint {place} is damaged: {error}")
                continue
            self.notices += [f"{problem}; going on from an earlier one" for problem in problems]
            return snapshot
        if problems:
            raise Refusal.listing(
                Reason.CHECKPOINT_INVALID, [*problems, "there is no other; start anew"]
            )
        return None

    def _serials(self) -> list[int]:
        """Of all checkpoints, oldest first."""
        names = [path.name for path in (self.out / FOLDER).iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def _clear(self) -> None:
        """Removes what a crash has left half written."""
        for path in (self.out / FOLDER).glob(f"{_NEW}*"):
            shutil.rmtree(path)


def is_run(folder: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (folder / CONFIG).is_file()


def _fill(folder: Path, snapshot: Snapshot) -> None:
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


def _read(folder: Path) -> Snapshot:
    """Raises OSError, ValueError or SafetensorError for anything that is not as it was written."""
    tensors = {}
    for line in (folder / _SUMS).read_text("utf-8").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / Path(name).name
        if _digest(path) != digest:
            raise ValueError(f"{path.name} is not as it was written")
        if name.endswith(_TENSORS):
            tensors[name.removesuffix(_TENSORS)] = load_file(path)
    return Snapshot(json.loads((folder / _STATE).read_text("utf-8")), tensors)


def _sync(path: Path) -> str:
    """Brings a file to the disk; returns its SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _on_disk(out: Path) -> Iterator[None]:
    """Turns what the operating system says about the run's folder into Refusal."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise Refusal(
                Reason.DISK_FULL,
                f"the disk of {out} is full; the last checkpoint there is whole: make room, then "
                "resume the run",
            ) from error
        raise Refusal(
            Reason.CONFIG_INVALID, f"{out} cannot be written: {error.strerror}"
        ) from error
