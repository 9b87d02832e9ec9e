"""Engines that are Python workers in a peer's own environment and speak JSON lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from load import Sampling
from workload import Job

from peers.child import Child
from peers.face import Fleet, PeerError, Run, Timing, checked

START_S, RUN_S = 900.0, 900.0


class WorkerEngine:
    """A worker process: `<python> <script> <settings as JSON>`.

    It prints a line with `about` once it is ready, then reads one line with jobs at a time and
    prints one with timings. Its lines are `{"peer": ...}`, so that other output does not matter.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str],
    ) -> None:
        """Returns when the worker is ready, paused. Raises PeerError."""
        self._name = name
        self._child = Child(command, log, env)
        try:
            self.about: Mapping[str, object] = self._child.answer(START_S)
        except BaseException:
            self._child.close()
            raise
        self._child.pause()

    def run(self, jobs: Sequence[Job], sampling: Sampling) -> Run:
        self._child.resume()
        message = {
            "jobs": [[job.adapter, list(job.token_ids), job.output_tokens] for job in jobs],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        answer = self._child.ask(message, RUN_S)
        self._child.pause()
        if "error" in answer:
            raise PeerError(f"{self._name}: {answer['error']}")
        timings = tuple(Timing(*timing) for timing in answer["answers"])
        return checked(jobs, Run(answer["seconds"], timings), self._name)

    def close(self) -> None:
        self._child.close()


def fleet_settings(fleet: Fleet) -> dict[str, object]:
    """The fleet as workers read it."""
    return {
        "adapters": {path.name: str(path.resolve()) for path in fleet.adapters},
        "max_rank": fleet.max_rank,
        "rows": fleet.rows,
        "context": fleet.context,
        "prefix_cache": fleet.prefix_cache,
    }
