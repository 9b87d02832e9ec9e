"""Adapters that are named at start: the forms of their names, and what a start makes of them."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from loraplex.v1 import adapter_pb2 as pb
from loraplex_server import cli
from loraplex_server.commands.program import app
from loraplex_server.config import Config
from loraplex_server.config_sources import ConfigError, load
from loraplex_server.declared.named import NamedAdapter, parse_modules, spread
from loraplex_server.exits import ServerExit
from loraplex_server.runtime.failures import StartFailure
from rpc.harness import Running, running, write_adapter
from typer.testing import CliRunner

KSERVE = [
    "serve", "--enable-lora", "--max-lora-rank=16", "--lora-modules",
    '\'{"name":"a","path":"/mnt/lora/a"}\'',
    '\'{"name":"publishers/ns/models/a","path":"/mnt/lora/a"}\'',
    "--model", "/mnt/models", "--port=1",
]  # fmt: skip


async def listed(up: Running) -> dict[str, pb.Adapter]:
    reply = await up.adapters.ListAdapters(pb.ListAdaptersRequest())
    return {each.name: each for each in reply.adapters}


def named(folder: Path, name: str, **values: Any) -> NamedAdapter:
    return NamedAdapter(name=name, path=folder, **values)


async def test_named_adapters_are_there_when_the_server_takes_calls(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "anywhere" / "one")
    two = write_adapter(tmp_path / "anywhere" / "two", seed=1)
    adapters = (
        named(one, "one", labels={"team": "a"}, load=True, alias="live"),
        named(two, "two", pin=True),
        named(one, "publishers/ns/models/one"),
    )
    async with running(tmp_path, adapters=adapters) as up:
        found = await listed(up)
        assert found["one"].labels == {"team": "a"}
        assert list(found["one"].aliases) == ["live"]
        assert found["one"].state == pb.ADAPTER_STATE_RESIDENT
        assert found["two"].pinned
        (foreign,) = found.keys() - {"one", "two"}
        assert foreign.startswith("publishers-ns-models-one-")
        assert found[foreign].labels["loraplex.dev/model-id"] == "publishers/ns/models/one"


async def test_a_restart_changes_nothing_unless_the_bytes_or_the_labels_have(
    tmp_path: Path,
) -> None:
    one = write_adapter(tmp_path / "one")
    for labels, version in (({}, 1), ({}, 1), ({"stage": "b"}, 1)):
        async with running(tmp_path, adapters=(named(one, "one", labels=labels),)) as up:
            found = await listed(up)
            assert (found["one"].version, dict(found["one"].labels)) == (version, labels)
    shutil.rmtree(one)
    write_adapter(one, seed=1)
    async with running(tmp_path, adapters=(named(one, "one", load=True),)) as up:
        found = await listed(up)
        assert (found["one"].version, found["one"].state) == (2, pb.ADAPTER_STATE_RESIDENT)


async def test_files_that_the_store_has_lost_are_brought_back(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one")
    async with running(tmp_path, adapters=(named(one, "one"),)):
        pass
    shutil.rmtree(tmp_path / "store" / "blobs" / "sha256")
    async with running(tmp_path, adapters=(named(one, "one", load=True),)) as up:
        assert (await listed(up))["one"].version == 1


@pytest.mark.parametrize("fault", ["missing", "rank", "empty", "name"])
async def test_one_that_cannot_be_registered_ends_the_start_with_one_line(
    tmp_path: Path, fault: str
) -> None:
    folder, name = tmp_path / "bad", "bad"
    if fault == "rank":
        write_adapter(folder, rank=8)
    elif fault == "name":
        write_adapter(folder)
        name = "a\x07b"
    elif fault == "empty":
        await asyncio.to_thread(folder.mkdir)
    good = write_adapter(tmp_path / "good")
    adapters = (named(folder, name), named(good, "good"))
    settings = {"adapters": adapters, "max_rank": 4}
    with pytest.raises(StartFailure) as failed:
        async with running(tmp_path, **settings):
            pass
    assert failed.value.code == ServerExit.BAD_CONFIG
    assert failed.value.message.startswith(f"the adapter {name} cannot be taken from {folder}: ")
    assert "adapters_required" in failed.value.message
    assert "\n" not in failed.value.message
    async with running(tmp_path, adapters_required=False, **settings) as up:
        assert list(await listed(up)) == ["good"]


def test_the_tables_of_the_file_are_adapters(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        '[[adapters]]\nname = "a"\npath = "/x/a"\nload = true\nlabels = {team = "t"}\n'
        '[[adapters]]\nname = "b"\npath = "/x/b"\nalias = "live"\n'
    )
    config = load(file, {})
    assert [(each.name, each.load, each.alias) for each in config.adapters] == [
        ("a", True, ""),
        ("b", False, "live"),
    ]
    for text, said in (
        ('[[adapters]]\nname = "a"\n', "adapters.0.path"),
        ('[[adapters]]\nname = "a"\npath = "x"\nsize = 1\n', "adapters.0.size"),
        ('[[adapters]]\nname = "a"\npath = "x"\n[[adapters]]\nname = "a"\npath = "y"\n', "'a'"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            load(file, {})


def test_modules_are_read_in_all_forms_of_other_servers() -> None:
    texts = [
        "a=/x/a", "org/b@main=/x=y", '{"name": "c", "path": "/x/c", "base_model_name": "m"}',
        "'{\"name\":\"d\",\"path\":\"/x/d\"}'",
    ]  # fmt: skip
    found = [(each.name, str(each.path)) for each in parse_modules(texts)]
    assert found == [("a", "/x/a"), ("org/b@main", "/x=y"), ("c", "/x/c"), ("d", "/x/d")]
    for text in ("a", "=x", "a=", "{}", "{", '{"name": "a"}', '{"name":"a","path":"x","scale":1}'):
        with pytest.raises(ValueError, match="'"):
            parse_modules([text])


def test_values_after_one_flag_are_spread_over_several() -> None:
    given = ["serve", "--lora-modules", "a=b", "c=d", "--port", "1", "--lora-modules=e=f", "g=h"]
    assert spread(given) == [
        "serve", "--lora-modules", "a=b", "--lora-modules", "c=d", "--port", "1",
        "--lora-modules=e=f", "--lora-modules", "g=h",
    ]  # fmt: skip
    assert spread(["serve", "--model", "x"]) == ["serve", "--model", "x"]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The settings with which a server would be started."""
    found: list[Config] = []

    def run(config: Config, engine: object) -> None:
        found.append(config)
        raise SystemExit(0)

    for place in ("_start_early", "keep_private", "logs.configure", "signal.signal"):
        monkeypatch.setattr(f"loraplex_server.commands.serve.{place}", lambda *_: None)
    monkeypatch.setattr("loraplex_server.app.run", run)
    return found


def test_the_command_line_of_kserve_is_understood(
    served: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["loraplex-server", *KSERVE])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    (config,) = served
    assert (config.max_rank, config.model, config.port) == (16, "/mnt/models", 1)
    assert [each.name for each in config.adapters] == ["a", "publishers/ns/models/a"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--max-loras", "4"], "--adapter-memory"),
        (["--max-cpu-loras=4"], "--host-adapter-memory"),
        (["--lora-modules", "a"], "NAME=PATH"),
        (["--lora-modules", "a=x", "a=y"], "two adapters have the name 'a'"),
    ],
)
def test_what_has_no_meaning_here_is_refused_with_what_has(
    served: list[Config], flags: list[str], said: str
) -> None:
    done = CliRunner().invoke(app, spread(["serve", *flags]))
    assert done.exit_code == ServerExit.BAD_CONFIG
    assert said in done.stderr
    assert served == []
