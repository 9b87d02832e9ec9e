"""Every panel shows something: a real Prometheus scrapes a loaded server and is asked."""

from __future__ import annotations

import contextlib
import shutil
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from loraplex import Client, LoraplexError
from rpc.harness import CRASH, write_adapter

from deploy import dashboard, exposition, live

VARIABLES = {"job": ".*", "instance": ".*", "__rate_interval": "5s", "__range": "1m"}
ADAPTERS = ("alpha", "beta", "gamma")


@dataclass(frozen=True, slots=True)
class Watched:
    """A Prometheus that has seen a server under load, from `start` to `end` (Unix seconds)."""

    prometheus: live.Prometheus
    start: float
    end: float


def traffic(client: Client) -> None:
    """A little of everything that a panel counts, with an answer to each call."""
    for prompt in ("the quick brown fox", "over the lazy dog " * 10):
        client.generate(prompt, max_new_tokens=8, temperature=0.0, ignore_eos=True)
        for name in ADAPTERS:
            for _ in client.stream(prompt, adapter=name, max_new_tokens=8, temperature=0.0):
                pass
    client.generate("the", regex="[a-z ]{1,9}", max_new_tokens=4)
    for wrong in ({"adapter": "unknown"}, {"regex": "("}):
        with contextlib.suppress(LoraplexError):
            client.generate("the", **wrong)
    client.unload_adapter(ADAPTERS[0])  # so that there is something to load again


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (`make prometheus` fetches it)")
    folder = tmp_path_factory.mktemp("scrape")
    for seed, name in enumerate(ADAPTERS):
        write_adapter(folder / "import" / name, seed)
    with (
        live.server(folder) as server,
        live.prometheus(binary, folder, server.admin) as prometheus,
        Client(server.target, timeout=30.0) as client,
    ):
        start = time.time()
        for name in ADAPTERS:
            client.register_adapter(name, name)
        scrapes = live.scraped(prometheus)

        # Rates need two scrapes with traffic between them; a few more make every window whole.
        def enough() -> bool:
            traffic(client)
            return live.scraped(prometheus) >= scrapes + 8

        live.wait_for(enough, 60)
        yield Watched(prometheus, start, time.time())


def test_every_query_of_every_panel_returns_data(watched: Watched) -> None:
    empty = [
        f"{query.panel}: {query.expr}"
        for query in dashboard.queries(dashboard.load())
        if not watched.prometheus.values(query.filled(VARIABLES), watched.start, watched.end)
    ]
    assert not empty, "\n".join(empty)


def test_the_panels_that_must_move_under_load_have_moved(watched: Watched) -> None:
    still = {
        "Output tokens/s", "Calls ended", "Refusals and failures", "Tokens", "Time to first token",
        "Rows per step, mean", "Different adapters in a step", "Generations by adapter",
        "Tokens by adapter", "KV blocks", "Adapter memory", "Loads and evictions", "Since last use",
    }  # fmt: skip
    for query in dashboard.queries(dashboard.load()):
        expr = query.filled(VARIABLES)
        if any(value > 0 for value in watched.prometheus.values(expr, watched.start, watched.end)):
            still.discard(query.panel)
    assert not still


def test_every_series_that_the_documents_list_is_in_the_scrape(watched: Watched) -> None:
    names = set(watched.prometheus.api("label/__name__/values"))
    # Nobody is identified here; `make check-observability` looks for these too.
    of_principals = ("loraplex_principal_", "loraplex_quota_")
    missing = exposition.server_series_names() - names
    assert not {name for name in missing if not name.startswith(of_principals)}


def test_the_variables_of_the_dashboard_find_the_server(watched: Watched) -> None:
    for variable in dashboard.load()["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = variable["definition"][len("label_values(") : -1].rsplit(", ", 1)
            metric = dashboard.Query("variable", metric).filled(VARIABLES)
            data = watched.prometheus.api("query", query=metric)
            assert all(series["metric"][label] for series in data["result"])
            assert data["result"], variable["name"]


def test_no_alert_fires_on_a_healthy_server(watched: Watched) -> None:
    rules = watched.prometheus.api("rules")["groups"][0]["rules"]
    assert rules
    assert not [rule for rule in rules if rule["health"] not in {"ok", "unknown"}]
    assert not [
        alert for alert in watched.prometheus.api("alerts")["alerts"] if alert["state"] == "firing"
    ]


def test_a_lost_engine_shows_in_the_metrics_and_comes_back(tmp_path: Path) -> None:
    (tmp_path / "import").mkdir()
    with live.server(tmp_path) as server, Client(server.target, timeout=30.0) as client:

        def sample(name: str) -> float:
            with urllib.request.urlopen(f"http://{server.admin}/metrics", timeout=10) as reply:
                lines = reply.read().decode().splitlines()
            return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

        assert sample("loraplex_engine_ready") == 1
        with pytest.raises(LoraplexError):
            client.generate(token_ids=[CRASH], timeout=5.0)
        live.wait_for(lambda: sample("loraplex_engine_restarts_total") >= 1, 30)
        live.wait_for(lambda: sample("loraplex_engine_ready") == 1, 30)
        assert client.generate("the", max_new_tokens=2, temperature=0.0).token_ids
