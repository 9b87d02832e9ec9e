"""A base model and two adapters answer the same question in one batch; every claim is checked.

    python examples/demo.py

Starts its own server on free ports, registers `examples/adapters/pirate` and `json`, asks each
model separately and then all at once, asks one of them through OpenAI's interface too, and stops
the server. The exit status is 0 only if all checks
hold. The first start downloads and converts the model and compiles the kernels; later starts are
quick. The last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo_checks import (
    BEHAVIOUR,
    Check,
    HttpAnswer,
    Samples,
    Steps,
    behaviour,
    digests,
    one_batch,
    over_http,
    parse_metrics,
    same_as_alone,
    steps_between,
)
from demo_view import SideBySide
from loraplex import AsyncClient, Completion, GenerateOptions, LoraplexError
from loraplex_adapters.format.digest import AdapterDigest
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))

from served import Server, ServerError, exit_on_sigterm  # noqa: E402

ADAPTERS = ROOT / "examples" / "adapters"
NAMES = ("base", *BEHAVIOUR)
QUESTION = "What is Python?"
HTTP_NAME = "pirate"
"""The adapter that is asked through OpenAI's interface, too."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The answers and metrics of the running server."""

    alone: Mapping[str, Completion]
    together: Mapping[str, Completion]
    http: HttpAnswer
    steps: Steps
    samples: Samples


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 if every check held, else 1."""
    args = parse(argv)
    console = Console()
    exit_on_sigterm()
    work = ROOT / "var" / "demo"
    work.mkdir(parents=True, exist_ok=True)
    store = Path(tempfile.mkdtemp(prefix="store-", dir=work))
    settings = {
        "cache": args.cache,
        "store": store,
        "import_root": ADAPTERS,
        "gateway": "127.0.0.1:0",
    }
    server = Server(settings, work / "server.log", Startup(console), timeout=args.timeout)
    try:
        expected = {name: digest_of(ADAPTERS / name) for name in BEHAVIOUR}
        console.print("starting the server (the first time takes about a minute)")
        with server:
            where = f"gRPC {server.address}, OpenAI's interface http://{server.http}/v1"
            console.print(f"ready in {server.ready_s:.1f} s: {where}", highlight=False)
            seen = asyncio.run(converse(server, args.question, console))
    except (ServerError, LoraplexError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        print(json.dumps({"ok": False, "error": str(error)}))
        return 1
    finally:
        shutil.rmtree(store, ignore_errors=True)

    checks = [
        *digests(seen.together, expected),
        *behaviour(seen.together),
        *same_as_alone(seen.together, seen.alone),
        over_http(seen.http, seen.together[HTTP_NAME]),
        one_batch(seen.steps, len(BEHAVIOUR)),
        Check("the server stopped cleanly", server.exit_code == 0, f"exit {server.exit_code}"),
    ]
    show_metrics(console, seen)
    show_checks(console, checks)
    failed = [check.claim for check in checks if not check.held]
    summary = {
        "ok": not failed,
        "checks": len(checks),
        "failed": failed,
        "distinct_adapters_in_one_step": seen.steps.most_distinct,
        "ready_s": round(server.ready_s, 2),
        "answers": {name: answer.text for name, answer in seen.together.items()},
        "digests": expected,
    }
    print(json.dumps(summary))
    return 1 if failed else 0


async def converse(server: Server, question: str, console: Console) -> Seen:
    """Registers the adapters, asks each alone and then all at once. Raises LoraplexError."""
    async with AsyncClient(server.address) as client:
        for name in BEHAVIOUR:
            info = (await client.register_adapter(name, name, load=True)).adapter
            console.print(
                f"registered {name}: rank {info.rank}, {', '.join(info.target_modules)}, "
                f"{info.digest[:19]}"
            )
        alone = {name: await client.generate(**ask(question, name)) for name in NAMES}
        before = await asyncio.to_thread(scrape, server.admin)
        console.print(f"\n[bold]{question}[/bold]")
        with SideBySide(console, NAMES) as view:
            answers = await asyncio.gather(
                *(listen(client, question, name, view) for name in NAMES)
            )
        after = await asyncio.to_thread(scrape, server.admin)
    http = await asyncio.to_thread(ask_over_http, server.http, question)
    together = dict(zip(NAMES, answers, strict=True))
    return Seen(alone, together, http, steps_between(before, after), after)


async def listen(client: AsyncClient, question: str, name: str, view: SideBySide) -> Completion:
    """Streams one answer into the view."""
    stream = client.stream(**ask(question, name))
    async for delta in stream:
        view.add(name, delta.text)
    view.done(name)
    return await stream.completion()


def ask(question: str, name: str) -> GenerateOptions:
    """The greedy request that is sent to all models; only the adapter differs."""
    return {
        "messages": [{"role": "user", "content": question}],
        "adapter": None if name == "base" else name,
        "temperature": 0.0,
        "max_new_tokens": 64,
    }


def ask_over_http(gateway: str, question: str) -> HttpAnswer:
    """The same request as any client of OpenAI would send it, to the adapter HTTP_NAME."""
    body = {
        "model": HTTP_NAME,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 64,
    }
    request = urllib.request.Request(
        f"http://{gateway}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer = json.load(reply)
        adapter = reply.headers["x-loraplex-adapter"] or ""
    return HttpAnswer(answer["choices"][0]["message"]["content"], adapter)


def digest_of(directory: Path) -> str:
    """Digest of an adapter's two files, computed from the bytes on disk."""
    try:
        config = (directory / "adapter_config.json").read_bytes()
        weights = (directory / "adapter_model.safetensors").read_bytes()
    except OSError as error:
        raise ServerError(
            f"{error.filename} is missing; make it again with: "
            "python examples/train_demo_adapters.py"
        ) from error
    digest = AdapterDigest(config, len(weights))
    digest.update(weights)
    return digest.text()


def scrape(admin: str) -> Samples:
    """The server's metrics, read over HTTP."""
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=10) as reply:
        return parse_metrics(reply.read().decode())


def show_metrics(console: Console, seen: Seen) -> None:
    """Shows three metrics as an operator would read them."""

    def value(name: str, **labels: str) -> float:
        return seen.samples.get((name, tuple(sorted(labels.items()))), 0.0)

    labels = {name: "_base" if name == "base" else name for name in NAMES}
    tokens = ", ".join(
        f"{name} {value('loraplex_adapter_tokens_total', adapter=label, kind='completion'):.0f}"
        for name, label in labels.items()
    )
    count = value("loraplex_time_to_first_token_seconds_count")
    first = value("loraplex_time_to_first_token_seconds_sum") / max(1.0, count)
    steps = ", ".join(
        f"{number} in {steps} steps" for number, steps in seen.steps.by_distinct.items() if steps
    )
    table = Table("metric", "value", title="from /metrics", title_justify="left")
    table.add_row("loraplex_adapter_tokens_total (completion)", tokens)
    table.add_row("loraplex_time_to_first_token_seconds (mean)", f"{1e3 * first:.0f} ms")
    table.add_row("loraplex_batch_distinct_adapters (this batch)", steps)
    console.print(table)


def show_checks(console: Console, checks: list[Check]) -> None:
    for check in checks:
        mark = "[green]ok[/green]  " if check.held else "[red]FAIL[/red]"
        console.print(f"{mark} {check.claim}", end="  ", highlight=False)
        console.print(check.seen, style="dim", markup=False, highlight=False, soft_wrap=True)


class Startup:
    """Prints every few seconds that the server is still starting, with the last line of its log."""

    def __init__(self, console: Console, every_s: float = 5.0) -> None:
        self._console, self._every, self._next = console, every_s, every_s

    def __call__(self, seconds: float, line: str) -> None:
        if seconds >= self._next:
            self._next = seconds + self._every
            self._console.print(f"  {seconds:.0f} s  {line}", markup=False, highlight=False)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="One base model and two adapters answer one question in one batch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--cache", type=Path, default=ROOT / "var" / "cache")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for the start"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
