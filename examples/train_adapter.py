"""Trains an adapter for a task that the base fails, tests it on held-out rows, and serves it.

    python examples/train_adapter.py           (or: make train-adapter)

The task is to turn an order written as a sentence into strict JSON. A seeded script generates the
rows (`python -m examples.tasks contacts`). No held-out row is in the training data, and half of the
held-out rows contain names that do not occur there. `loraplex-train` trains the adapter, which is
then uploaded to a server on free ports and asked the held-out questions. The exit status is 0 only
if the base fails, the adapter does not, and the server's answers carry the adapter's digest. The
last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex import Client, LoraplexError
from loraplex_training.report import lines as event_lines
from loraplex_training.report.events import Evaluated, Published
from rich.console import Console
from rich.table import Table
from tasks import write

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))

from served import Server, ServerError, exit_on_sigterm  # noqa: E402

NAME, TASK = "contacts", "contacts"
TRAIN_ROWS, HELD_OUT_ROWS, SEED = 192, 60, 1
RECIPE = {
    "--set": ("r=16", "target_modules=all-linear"),
    "--lr": ("2e-3",),
    "--warmup": ("0.1",),
    "--epochs": ("1",),
    "--batch-size": ("8",),
    "--max-length": ("160",),
    "--save-every": ("1000",),
    "--eval-every": ("100000",),  # before the first step and after the last
    "--metric": ("exact",),
    "--metric-examples": (str(HELD_OUT_ROWS),),
}
GOOD, BAD = 0.8, 0.2
"""Smallest share of correct answers of the adapter, and largest of the base."""


@dataclass(frozen=True, slots=True)
class Trained:
    """The results that the run reported."""

    before: float
    after: float
    folder: Path
    digest: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The server's answer to a held-out row."""

    question: str
    wanted: str
    base: str
    adapter: str
    digest: str


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 if all expectations hold, else 1."""
    args = parse(argv)
    console = Console(highlight=False)
    exit_on_sigterm()
    began = time.monotonic()
    top = ROOT / "var" / "showcase"
    top.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="run-", dir=top))
    try:
        held_out = write(TASK, work / "held_out.jsonl", HELD_OUT_ROWS, SEED, held_out=True)
        data = write(TASK, work / "train.jsonl", TRAIN_ROWS, SEED)
        console.print(f"{work} has {TRAIN_ROWS} rows for training, {HELD_OUT_ROWS} are held out")
        trained = train(data, held_out, work, args, console)
        settings = {"cache": args.cache, "store": work / "store"}
        console.print("starting a server")
        with Server(settings, work / "server.log", timeout=args.timeout) as server:
            console.print(f"ready in {server.ready_s:.1f} s: gRPC {server.address}")
            answers = ask(server.address, trained.folder, read(held_out)[: args.ask])
    except (ServerError, LoraplexError, OSError, subprocess.CalledProcessError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        print(json.dumps({"ok": False, "error": str(error)}))
        return 1
    show(answers, console)
    served = {answer.digest for answer in answers}
    failed = verdict(trained, answers)
    for claim in failed:
        console.print(f"FAIL {claim}", style="red")
    summary = {
        "exact_match_before": trained.before,
        "exact_match_after": trained.after,
        "held_out": HELD_OUT_ROWS,
        "seconds": round(time.monotonic() - began, 1),
        "served_digest": served.pop() if len(served) == 1 else sorted(served),
        "failed": failed,
    }
    print(json.dumps(summary))
    return 1 if failed else 0


def train(
    data: Path, held_out: Path, work: Path, args: argparse.Namespace, console: Console
) -> Trained:
    """Runs the trainer's command. Raises CalledProcessError."""
    command = ["loraplex-train", "run", "--data", str(data), "--name", NAME]
    command += ["--eval-data", str(held_out), "--out", str(work / "run")]
    command += ["--cache", str(args.cache), "--dtype", args.dtype]
    for flag, values in RECIPE.items():
        for value in values:
            command += [flag, value]
    command += ["--store", str(work / "store")]
    console.print("$ " + " ".join(command), style="dim", soft_wrap=True, markup=False)
    events = work / "events.jsonl"
    program = [sys.executable, "-m", "loraplex_training", *command[1:]]
    subprocess.run([*program, "--events", str(events)], check=True, env=os.environ)
    told = [event_lines.decode(line) for line in events.read_bytes().splitlines()]
    shares = [e.metric for e in told if isinstance(e, Evaluated) and e.metric is not None]
    (published,) = [e for e in told if isinstance(e, Published)]
    return Trained(shares[0], shares[-1], published.path, published.digest)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(address: str, folder: Path, rows: Sequence[dict[str, str]]) -> list[Answer]:
    """Uploads the adapter, then asks the base and the adapter. Raises LoraplexError."""
    with Client(address) as client:
        client.upload_adapter(NAME, folder, replace=True, load=True)
        answers = []
        for row in rows:
            said = [
                client.generate(
                    messages=[{"role": "user", "content": row["prompt"]}],
                    adapter=adapter,
                    temperature=0.0,
                    max_new_tokens=64,
                )
                for adapter in (None, NAME)
            ]
            digests = [used.digest for used in said[1].adapters]
            answers.append(
                Answer(row["prompt"], row["completion"], said[0].text, said[1].text, digests[0])
            )
        return answers


def verdict(trained: Trained, answers: Sequence[Answer]) -> list[str]:
    """Returns the expectations that do not hold."""
    right = sum(answer.adapter.strip() == answer.wanted for answer in answers) / len(answers)
    claims = {
        f"the base is right at most {BAD:.0%} of the time": trained.before <= BAD,
        f"the adapter is right at least {GOOD:.0%} of the time": trained.after >= GOOD,
        f"and so it is on the server ({right:.0%})": right >= GOOD,
        "the server answered with the adapter's digest": {a.digest for a in answers}
        == {trained.digest},
    }
    return [claim for claim, held in claims.items() if not held]


def show(answers: Sequence[Answer], console: Console) -> None:
    """Shows some of the server's answers side by side."""
    table = Table("held out", "base", NAME, title="answers of the server", title_justify="left")
    for answer in answers[:4]:
        mark = "[green]" if answer.adapter.strip() == answer.wanted else "[red]"
        base = answer.base if len(answer.base) < 200 else answer.base[:197] + "..."
        table.add_row(answer.question, base, mark + answer.adapter.replace("[", "\\["))
        table.add_section()
    console.print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an adapter on a task that the base fails, and serve it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "var" / "cache")
    parser.add_argument("--dtype", default="auto", help="type of the base in training")
    parser.add_argument("--ask", type=int, default=12, help="number of rows sent to the server")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for the start"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
