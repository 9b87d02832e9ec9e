"""Runs the examples of docs/clients.md, and proofs for some of the clients: make test-clients

    python tests/clients/run.py [NAME ...] [--flagged]

Starts its own server of the default model, with a gateway and the adapter `pirate`, and stops it.
Each client has an environment below `var/clients`, made at its first run, while others run. The
last line of output is one JSON object: how many `clients` were chosen and have `passed`, which ones
`failed`, which were `skipped` and why, and the largest difference between a log-likelihood that
lm-eval read from the gateway and that of transformers with PEFT.

A client is skipped if it cannot be installed here, for example because a registry does not answer;
that alone is no failure. Exit code 1 if a client failed, or if none could be run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench")]

import base  # noqa: E402
from loraplex import Client  # noqa: E402
from served import Server, ServerError, exit_on_sigterm  # noqa: E402

from clients import environments, lm_eval_results  # noqa: E402
from clients.documents import Example, examples  # noqa: E402
from clients.environments import CannotInstall, Environments, WrongPackages  # noqa: E402

ADAPTERS = ROOT / "examples" / "adapters"
PROOFS = Path(__file__).parent / "proofs"
SPECIFICATION = ROOT / "gateway" / "openapi.yaml"
SECONDS = 900
"""After which a program counts as hanging: a multiple of what any takes on a busy machine."""
MOST_DIFFERENCE = 1e-3
"""Of the sum over a continuation of up to 40 tokens in float32."""


@dataclass(frozen=True, slots=True)
class Gateway:
    """The addresses of a server and its gateway, as host:port."""

    http: str
    grpc: str


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    exit_on_sigterm()
    tried = Tried()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        try:
            # The environments are made while the server starts and the first clients run.
            with (
                Environments(args.work, args.chosen) as places,
                served(work, args.cache) as gateway,
            ):
                for each in args.chosen:
                    try_client(each, places, gateway, work, tried)
        except ServerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print(json.dumps({"clients": len(args.chosen), **asdict(tried)}))
    return tried.exit_code


@dataclass(slots=True)
class Tried:
    """The clients that were tried so far.

    Attributes:
        passed: number of those that passed.
        failed: names of those that failed, or whose packages the document names wrongly.
        skipped: why others could not be installed here, by name.
        lm_eval_max_difference: largest difference of a log-likelihood from PEFT's.
    """

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    lm_eval_max_difference: float | None = None

    @property
    def exit_code(self) -> int:
        """0 if none failed and at least one passed; that some were skipped is no failure."""
        return 1 if self.failed or not self.passed else 0


def try_client(
    example: Example, places: Environments, gateway: Gateway, work: Path, tried: Tried
) -> None:
    """Runs one client and records it. Only a client that cannot be installed is skipped."""
    name = example.name
    waited = time.monotonic()
    try:
        place = places.of(example)
        began = time.monotonic()
        text = run(example, place, gateway, work)
        if name == "lm-eval":
            tried.lm_eval_max_difference = compared(work / name / "results")
    except CannotInstall as error:
        tried.skipped[name] = str(error).splitlines()[-1].strip()[:300]
        print(f"skipped: {name}: {error}", flush=True)
    except (Failed, WrongPackages) as error:
        tried.failed.append(name)
        print(f"FAILED: {name}: {error}", flush=True)
    else:
        tried.passed += 1
        took = f"{time.monotonic() - began:.0f} s, after {began - waited:.0f} s of installing"
        print(f"ok: {name} in {took}: {text.strip().splitlines()[-1][:100]}", flush=True)


class Failed(Exception):
    """A client's program failed; the text is the end of what it printed."""


def compared(results: Path) -> float:
    """The largest difference of a log-likelihood from PEFT's. Raises Failed if it is too large."""
    try:
        found = lm_eval_results.largest_difference(results, base.ensure(), ADAPTERS / "pirate")
    except lm_eval_results.NoResults as error:
        raise Failed(str(error)) from None
    if not found <= MOST_DIFFERENCE:
        raise Failed(f"a log-likelihood differs from PEFT's by {found}")
    return found


@contextmanager
def served(work: Path, cache: Path) -> Iterator[Gateway]:
    """A server with a gateway and the adapter `pirate`, in float32, which proofs compare."""
    settings = {
        "cache": cache,
        "store": work / "store",
        "import_root": ADAPTERS,
        "dtype": "float32",
        "gateway": "127.0.0.1:0",
        "training": True,
        "training_jobs_dir": work / "jobs",
    }
    folders = {"LORAPLEX_GATEWAY_ADAPTER_ROOT": str(ADAPTERS)}
    with Server(settings, work / "server.log", environment=folders) as server:
        with Client(server.address) as client:
            client.register_adapter("pirate", "pirate", load=True)
        yield Gateway(server.http, server.address)


def run(example: Example, place: Path, gateway: Gateway, work: Path) -> str:
    """Runs an example and its proof, if there is one. Returns the output. Raises Failed."""
    folder = work / example.name
    folder.mkdir()
    for part in ("proto", "gateway"):
        (folder / part).symlink_to(ROOT / part)
    if any(f"{mark}tokenizer " in example.code for mark in "= "):
        (folder / "tokenizer").symlink_to(base.ensure().resolve())
    endings = {"python": "py", "js": "mjs", "sh": "sh"}
    script = folder / f"example.{endings[example.language]}"
    script.write_text(example.at(gateway.http, gateway.grpc), "utf-8")
    if example.language == "js":
        (folder / "node_modules").symlink_to(place / "node_modules")
    text = finished(environments.command(example, place, script), place, folder)
    for proof in sorted(PROOFS.glob(f"{example.name}.*")):
        copy = folder / f"proof_{proof.name}"
        shutil.copy(proof, copy)
        words = environments.command(example, place, copy)
        words += [f"http://{gateway.http}/v1", str(SPECIFICATION), str(ADAPTERS)]
        text += finished(words, place, folder)
    return text


def finished(words: list[str], place: Path, folder: Path) -> str:
    """What a program printed. Raises Failed if it failed or printed nothing."""
    log = folder / "output.log"
    with log.open("w+") as output:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environments.variables(place),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code = None
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):  # nothing that it started is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        text = output.read()
    if code != 0 or not text.strip():
        why = f"did not end within {SECONDS} s" if code is None else f"exit status {code}"
        raise Failed(f"{why}: {text[-2500:]}")
    return text


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run programs that others wrote against a server with its gateway."
    )
    parser.add_argument("names", nargs="*", help="only these clients (all that are not by flag)")
    parser.add_argument("--flagged", action="store_true", help="also those with large environments")
    parser.add_argument("--cache", type=Path, default=Path("var/cache"), help="cache of the server")
    parser.add_argument(
        "--work", type=Path, default=Path("var/clients"), help="where the environments are"
    )
    args = parser.parse_args(argv)
    known = {each.name: each for each in examples(ROOT / "docs" / "clients.md")}
    for name in args.names:
        if name not in known:
            parser.error(f"docs/clients.md has no client {name}; it has {', '.join(known)}")
    args.chosen = [
        each
        for each in known.values()
        if (each.name in args.names if args.names else args.flagged or not each.flagged)
    ]
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    sys.exit(main())
