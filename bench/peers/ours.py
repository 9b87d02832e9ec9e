"""Loraplex itself, measured over gRPC with streamed tokens."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import load
import measure
from load import Sampling
from loraplex import Client
from served import Server
from workload import Job

from peers.face import Fleet, PeerError, Run, Timing, checked


class LoraplexEngine:
    """A server with all adapters of a fleet registered, and as many loaded as have room.

    It is not paused: an idle server takes a few milliseconds of processor time in a second.
    """

    about: Mapping[str, object]

    def __init__(self, server: Server, fleet: Fleet, about: Mapping[str, object]) -> None:
        self._server = server
        self.about = about
        server.start()
        try:
            if len(fleet.adapters) > fleet.rows:
                with Client(server.address) as client:
                    for path in fleet.adapters:
                        client.register_adapter(path.name, path.name)
            else:
                measure.register(server.address, fleet.adapters)
        except BaseException:
            server.stop()
            raise

    def run(self, jobs: Sequence[Job], sampling: Sampling) -> Run:
        answers = asyncio.run(
            load.run(self._server.address, jobs, load.Pace(len(jobs), limit_s=900.0), sampling)
        )
        failed = [answer.error for answer in answers if answer.error]
        if failed:
            raise PeerError(f"loraplex: {failed}")
        end = max(answer.tokens[-1][0] for answer in answers)
        run = Run(end - min(a.sent for a in answers), tuple(_timing(a) for a in answers))
        return checked(jobs, run, "loraplex")

    def close(self) -> None:
        self._server.stop()


class Loraplex:
    """This project's server, with the settings of `bench-peers`."""

    name = "loraplex"
    most_adapters = 1000

    def __init__(self, work: Path, settings: Mapping[str, object]) -> None:
        """`settings` become flags of the server; its store is below `work` and is emptied first."""
        self._work, self._settings = work, settings

    def open(self, fleet: Fleet, log: Path) -> LoraplexEngine:
        store = self._work / "store"
        shutil.rmtree(store, ignore_errors=True)
        settings: dict[str, object] = {"store": store, **self._settings}
        if fleet.adapters:
            settings["import_root"] = fleet.adapters[0].parent
        return LoraplexEngine(
            Server(settings, log),
            fleet,
            {name: str(value) for name, value in self._settings.items()},
        )


def _timing(answer: load.Answer) -> Timing:
    """The step is the median gap, which waits for other prompts do not change."""
    gaps = answer.gaps
    step = load.percentile(gaps, 50) if gaps else None
    return Timing(len(answer.token_ids), answer.tokens[0][0] - answer.sent, step)
