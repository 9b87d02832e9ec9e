"""llama.cpp's server, from a build directory that LORAPLEX_PEER_LLAMA_CPP names.

Requests are answered whole instead of token by token, which saves the server time. The base is
made from the same weights by `llama-quantize`, and adapters by `convert_lora_to_gguf.py` of the
sources that the build directory belongs to.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from load import GREEDY, Sampling
from workload import Job

from peers.child import Child
from peers.face import Fleet, PeerError, PeerMissing, Run, Timing, checked

VARIABLE = "LORAPLEX_PEER_LLAMA_CPP"
START_S, RUN_S = 300.0, 900.0
LAYOUTS: tuple[tuple[str, ...], ...] = ((), ("--no-repack",))
"""Flags to choose from: weights rearranged for the processor (also for AMX), or as in the file."""


class LlamaServer:
    """A running `llama-server`; adapters have the numbers of their order."""

    def __init__(
        self,
        program: Path,
        model: Path,
        flags: Sequence[str],
        fleet: Fleet,
        adapters: Sequence[Path],
        log: Path,
    ) -> None:
        """Returns when it is ready, paused. Raises PeerError."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self._port = found.getsockname()[1]
        cores = str(len(os.sched_getaffinity(0)))
        command = [
            *(
                str(program),
                "--model",
                str(model),
                "--host",
                "127.0.0.1",
                "--port",
                str(self._port),
            ),
            *("--parallel", str(fleet.rows), "--ctx-size", str(fleet.rows * (fleet.context + 8))),
            *("--threads", cores, "--threads-batch", cores, "--no-ui", "--no-kv-unified"),
            *flags,
        ]
        if adapters:
            command += ["--lora", ",".join(map(str, adapters)), "--lora-init-without-apply"]
        self._numbers = {path.name: i for i, path in enumerate(fleet.adapters)}
        self._cache = fleet.prefix_cache
        self._child = Child(command, log)
        self.about: Mapping[str, object] = {"base": model.stem, "flags": " ".join(flags) or None}
        try:
            self._await_ready()
        except BaseException:
            self._child.close(reads_input=False)
            raise
        self._child.pause()

    def _await_ready(self) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self._child.process.poll() is not None:
                raise self._child.failed(f"ended with exit code {self._child.process.returncode}")
            try:
                if self._call("GET", "/health", None)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise self._child.failed(f"was not ready within {START_S:.0f} s")

    def run(self, jobs: Sequence[Job], sampling: Sampling) -> Run:
        self._child.resume()
        bodies = [json.dumps(self._request(job, sampling)).encode() for job in jobs]
        with ThreadPoolExecutor(len(jobs)) as threads:
            start = time.perf_counter()
            answers = list(threads.map(self._complete, bodies))
            seconds = time.perf_counter() - start
        self._child.pause()
        failed = [answer for status, answer in answers if status != 200]
        if failed:
            raise PeerError(f"llama.cpp: {failed[0]}")
        timings = tuple(_timing(answer) for _, answer in answers)
        return checked(jobs, Run(seconds, timings), "llama.cpp")

    def _request(self, job: Job, sampling: Sampling) -> dict[str, object]:
        chosen = self._numbers[job.adapter] if job.adapter else -1
        return {
            "prompt": job.token_ids,
            "n_predict": job.output_tokens,
            "ignore_eos": True,
            "cache_prompt": self._cache,
            "samplers": ["top_p", "temperature"] if sampling.temperature else [],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "response_fields": ["tokens_predicted", "timings"],
            "lora": [{"id": i, "scale": float(i == chosen)} for i in self._numbers.values()],
        }

    def _complete(self, body: bytes) -> tuple[int, Any]:
        return self._call("POST", "/completion", body)

    def _call(self, verb: str, path: str, body: bytes | None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=RUN_S)
        try:
            connection.request(verb, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def close(self) -> None:
        self._child.close(reads_input=False)


class LlamaCpp:
    """llama.cpp with the base in the fastest one of its 4-bit types and layouts of weights."""

    name = "llama.cpp"
    most_adapters = 64

    def __init__(self, base: Path, gguf: Path, work: Path, types: Sequence[str]) -> None:
        """`gguf` is the base as GGUF, `base` as a Hugging Face directory. Raises PeerMissing."""
        self._build = Path(os.environ.get(VARIABLE, "/nonexistent"))
        self._program = self._build / "bin" / "llama-server"
        if not self._program.is_file():
            raise PeerMissing(f"{VARIABLE} names no build directory of llama.cpp")
        self._base, self._gguf, self._work = base, gguf, work / "gguf"
        self._settings = [(kind, flags) for kind in types for flags in LAYOUTS]

    def open(self, fleet: Fleet, log: Path) -> LlamaServer:
        adapters = [self._adapter(path) for path in fleet.adapters]
        if len(self._settings) > 1:
            self._settings = [self._fastest(log)]
        ((kind, flags),) = self._settings
        return LlamaServer(self._program, self._model(kind), flags, fleet, adapters, log)

    def _fastest(self, log: Path) -> tuple[str, tuple[str, ...]]:
        """The type and flags that answer sixteen short base requests in the shortest time."""
        fleet = Fleet((), 0, rows=16, context=96)
        jobs = [Job("", tuple(range(1000 + i, 1064 + i)), 24) for i in range(16)]
        seconds = {}
        for kind, flags in self._settings:
            server = LlamaServer(self._program, self._model(kind), flags, fleet, [], log)
            try:
                server.run(jobs, GREEDY)
                seconds[kind, flags] = min(server.run(jobs, GREEDY).seconds for _ in range(2))
            finally:
                server.close()
        told = ", ".join(
            f"{' '.join((kind, *flags))} {taken:.2f}" for (kind, flags), taken in seconds.items()
        )
        print(f"llama.cpp, seconds by type: {told}", flush=True)
        return min(seconds, key=lambda setting: seconds[setting])

    def _model(self, kind: str) -> Path:
        target = self._work / f"{kind}.gguf"
        quantise = [str(self._build / "bin" / "llama-quantize"), "--allow-requantize"]
        return _made(target, [*quantise, str(self._gguf), "{out}", kind])

    def _adapter(self, path: Path) -> Path:
        """The adapter as GGUF; made again if the weights of `path` are newer."""
        script = str(self._sources() / "convert_lora_to_gguf.py")
        target = self._work / path.parent.name / f"{path.name}.gguf"
        weights = path / "adapter_model.safetensors"
        if target.exists() and target.stat().st_mtime < weights.stat().st_mtime:
            target.unlink()
        command = [sys.executable, script, "--base", str(self._base), "--outtype", "f16"]
        return _made(target, [*command, "--outfile", "{out}", str(path)])

    def _sources(self) -> Path:
        cache = (self._build / "CMakeCache.txt").read_text()
        found = re.search(r"^CMAKE_HOME_DIRECTORY:INTERNAL=(.*)$", cache, re.MULTILINE)
        if not found:
            raise PeerMissing(f"{self._build} is not a build directory of CMake")
        return Path(found.group(1))


def _made(target: Path, command: Sequence[str]) -> Path:
    """Runs a command that writes `{out}` unless `target` exists. Raises PeerError."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".unfinished")
    done = subprocess.run(
        [part.replace("{out}", str(unfinished)) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode or not unfinished.exists():
        raise PeerError(f"{command[0]} failed: {done.stdout[-2000:]}")
    unfinished.rename(target)
    return target


def _timing(answer: Mapping[str, Any]) -> Timing:
    times = answer["timings"]
    tokens = int(answer["tokens_predicted"])
    step = times["predicted_ms"] / 1e3 / (tokens - 1) if tokens > 1 else None
    return Timing(tokens, times["prompt_ms"] / 1e3, step)
