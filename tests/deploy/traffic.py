"""Traffic that moves every panel and every series of an alert: use, trouble and limits."""

from __future__ import annotations

import contextlib
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loraplex import Client, LoraplexError
from loraplex_server.access.identity.key_file import KeyFile
from rpc.harness import CRASH, FAULT, NONFINITE, write_adapter, write_prompt
from rpc.training_jobs import SCRIPT, lines

ADAPTERS = ("alpha", "beta", "gamma", "delta", "epsilon")
SOFT = "soft"
"""An adapter with virtual tokens."""

GREEDY: Final = {"temperature": 0.0}
"""The oracle says no token that ends its process, but sampling may choose one."""

PRINCIPALS = """
[principals.operator]
roles = ["infer", "read", "register", "admin", "train"]
adapters = "*"
base = true
imports = ""

[principals.search]
roles = ["infer", "read"]
adapters = "team=search"
base = true

[principals.search.limits]
requests_per_minute = 30
tokens_per_minute = 100000
concurrent_requests = 4
"""


def settings(folder: Path) -> dict[str, Any]:
    """Settings of a server that does everything that can be measured; writes its files."""
    for seed, name in enumerate(ADAPTERS):
        write_adapter(folder / "import" / name, seed)
    write_prompt(folder / "import" / SOFT, 4)
    (folder / "principals.toml").write_text(PRINCIPALS)
    for name in ("operator", "search"):
        _, key = KeyFile(folder / "keys.json").add(name)
        (folder / f"{name}.key").write_text(key)
    return {
        "engine_options": {
            "num_slots": 3,
            "num_blocks": 256,
            "prefix_blocks": 8,
            "step_seconds": 0.002,
            "host_budget_bytes": 4096,
            "merge_budget_bytes": 1 << 20,
            "merges_files": True,
        },
        "max_running": 4,
        "max_waiting": 4,
        "training": True,
        "training_jobs_dir": folder / "training",
        "trainer": [sys.executable, "-I", "-S", str(SCRIPT)],
        "principals": folder / "principals.toml",
        "keys": folder / "keys.json",
    }


@dataclass(frozen=True, slots=True)
class Callers:
    """Clients of the principals of `PRINCIPALS`."""

    operator: Client
    search: Client


@contextlib.contextmanager
def callers(folder: Path, target: str) -> Iterator[Callers]:
    """Clients with the key of each principal, for a server with these `settings`."""
    with ExitStack() as stack:

        def client(principal: str) -> Client:
            key = (folder / f"{principal}.key").read_text()
            metadata = [("authorization", f"Bearer {key}")]
            return stack.enter_context(Client(target, timeout=30.0, metadata=metadata))

        yield Callers(client("operator"), client("search"))


def prepare(operator: Client) -> None:
    """Registers the adapters."""
    for name in (*ADAPTERS, SOFT):
        operator.register_adapter(name, name, labels={"team": "search"})


def use(by: Callers) -> None:
    """Calls of every kind that succeed; more adapters than there are places for."""
    for prompt in ("the quick brown fox", "over the lazy dog " * 10):
        for client in (by.operator, by.search):
            attempt(client.generate, prompt, max_new_tokens=8, **GREEDY, ignore_eos=True)
        for name in (*ADAPTERS, SOFT):
            for _ in by.operator.stream(prompt, adapter=name, max_new_tokens=8, **GREEDY):
                pass
    by.operator.generate("the", mix={"alpha": 1.0, "beta": 0.5}, max_new_tokens=4, **GREEDY)
    attempt(by.operator.generate, "the", regex="[a-z ]{1,9}", max_new_tokens=4)
    by.operator.merge_adapter("alpha")
    by.operator.generate("the quick", adapter="alpha", max_new_tokens=4, **GREEDY)
    by.operator.unmerge_adapter("alpha")
    by.operator.unload_adapter("alpha")


def train(operator: Client, folder: Path) -> None:
    """A training job that succeeds, one that fails and one that is cancelled."""
    made = write_adapter(folder / "made", 9)
    for name, texts in (("made", ("step 2", f"publish {made}")), ("broken", ("diverge",))):
        job = operator.training.create(name, lines(*texts), steps=9)
        for _ in operator.training.watch(job.job_id):
            pass
    job = operator.training.create("held", lines("step 1", "hold"), steps=9)
    operator.training.cancel(job.job_id)


def trouble(by: Callers) -> None:
    """Refusals and failures: of a client, for load, for a limit, of the engine."""
    attempt(by.operator.generate, "the", adapter="unknown")
    attempt(by.operator.generate, "the", regex="(")
    attempt(by.search.load_adapter, "alpha")
    attempt(by.operator.generate, token_ids=[20, FAULT], max_new_tokens=2)
    attempt(by.operator.generate, token_ids=[20, NONFINITE], max_new_tokens=2)
    for _ in range(35):
        attempt(by.search.generate, "the", max_new_tokens=1, **GREEDY)
    with ThreadPoolExecutor(24) as pool:
        options = {"max_new_tokens": 60, "ignore_eos": True, **GREEDY}
        for _ in range(24):
            pool.submit(attempt, by.operator.generate, "the lazy dog", **options)


def over_http(gateway: str, key: str) -> None:
    """Requests to the gateway: a whole answer, a stream, one that is refused, one that fails."""
    asked = {"model": "alpha", "prompt": "the", "max_tokens": 4, "temperature": 0}
    for path, fields in (
        ("/v1/completions", asked),
        ("/v1/completions", {**asked, "stream": True}),
        ("/v1/completions", {**asked, "model": "unknown"}),
        ("/v1/completions", {**asked, "prompt": [20, FAULT]}),
        ("/nowhere", asked),
    ):
        headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        request = urllib.request.Request(
            f"http://{gateway}{path}", json.dumps(fields).encode(), headers
        )
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request) as reply:
            reply.read()


def crash(operator: Client) -> None:
    """The engine's process ends."""
    attempt(operator.generate, token_ids=[20, CRASH], max_new_tokens=2, timeout=5.0)


def answers(client: Client) -> bool:
    """Whether the server generates."""
    try:
        client.generate("the", max_new_tokens=1, timeout=5.0, **GREEDY)
    except LoraplexError:
        return False
    return True


def attempt(call: Callable[..., object], *arguments: Any, **options: Mapping[str, Any]) -> None:
    """Makes a call that may be refused."""
    with contextlib.suppress(LoraplexError):
        call(*arguments, **options)
