"""Settings: where they come from, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest
from loraplex_server.commands.flags import ALL_SETTINGS
from loraplex_server.commands.program import app
from loraplex_server.config import Config
from loraplex_server.config_sources import ConfigError, load
from loraplex_server.engine.process.setup import EngineSetup
from loraplex_server.exits import ServerExit
from loraplex_server.settings import PANELS
from typer.testing import CliRunner


def test_flags_beat_the_environment_which_beats_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nmax_rank = 2\nmodel = "from-file"\nkv_memory = "2MiB"\n')
    monkeypatch.setenv("LORAPLEX_PORT", "10")
    monkeypatch.setenv("LORAPLEX_MAX_RANK", "20")
    config = load(file, {"port": "100"})
    assert (config.port, config.max_rank, config.model) == (100, 20, "from-file")
    assert config.kv_memory == 2 << 20
    assert config.token_budget == Config().token_budget


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"port": "70000"}, "port: "),
        ({"port": "x"}, "port: "),
        ({"no_such": "1"}, "no_such: there is no such setting"),
        ({"share_base_prefixes": True}, "share_base_prefixes: this setting is now called prefix_"),
        ({"dtype": "int8"}, "dtype: "),
        ({"max_running": "1000", "token_budget": "10"}, "max_running must be at most"),
        ({"kv_memory": "lots"}, "kv_memory: "),
        ({"host": "0.0.0.0"}, "--insecure"),
        ({"host": "::"}, "--insecure"),
        ({"host": "example.org"}, "--insecure"),
        ({"admin_host": "10.0.0.1"}, "--insecure"),
        ({"engine_factory": "os.system('x')"}, "engine_factory: "),
        ({"devices": "gpu0"}, "devices: 'gpu0' is no device"),
        ({"devices": "0,"}, "devices: '' is no device"),
        ({"devices": "-1"}, "devices: '-1' is no device"),
        ({"devices": "0,cuda:0"}, "devices: cuda:0 is named twice"),
        ({"devices": "0,cpu"}, "devices: '0,cpu' mixes CPU and GPU"),
        ({"devices": ",".join(["cpu"] * 17)}, "devices: 17 devices are named; a server has at"),
        ({"devices": "0,1", "device": "cpu"}, "device is 'cpu', and devices names cuda:0"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, flags)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ('""', []),
        ('"cpu"', ["cpu:0"]),
        ('"cpu, cpu"', ["cpu:0", "cpu:1"]),
        ('"cuda:1,0"', ["cuda:1", "cuda:0"]),
        ("[0, 1]", ["cuda:0", "cuda:1"]),
        ("3", ["cuda:3"]),
    ],
)
def test_devices_are_numbers_of_gpus_or_cpus(
    tmp_path: Path, written: str, names: list[str]
) -> None:
    (tmp_path / "server.toml").write_text(f"devices = {written}\n")
    config = load(tmp_path / "server.toml", {})
    assert [placement.name for placement in config.placements] == names
    assert config.engine_device == (names[0].partition(":")[0] if names else "auto")
    assert config.trainer_options()["device"] == config.engine_device


def test_engines_on_the_cpu_share_its_threads_and_the_front_counts_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loraplex_server.config.available_cores", lambda: 9)
    threads = [
        load(None, {"devices": devices, "threads": given}).engine_threads
        for devices, given in [
            *(("", 0), ("cpu", 0), ("cpu,cpu", 0), ("cpu,cpu", 6), ("cpu,cpu", 1)),
            *(("0,1", 0), ("0,1", 6)),
        ]
    ]
    assert threads == [0, 0, 4, 3, 1, 0, 6]
    config = load(None, {"devices": "0,1,2", "max_running": 10, "max_waiting": 5})
    assert config.max_requests == 35
    assert config.engine_limits().max_running == 10


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_the_loopback_needs_no_consent(host: str) -> None:
    assert load(None, {"host": host}).host == host


def test_the_world_is_served_only_with_consent() -> None:
    assert load(None, {"host": "0.0.0.0", "insecure": True}).host == "0.0.0.0"


@pytest.mark.parametrize("content", ["port = ", "port = 1\nport = 2\n", "\xff\x00"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "broken.toml"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load(file, {})
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load(tmp_path / "missing.toml", {})


def test_the_resolved_settings_are_shown_and_hidden_ones_are_not() -> None:
    lines = load(None, {"port": "77"}).lines()
    assert "port = 77" in lines
    shown = {line.partition(" ")[0] for line in lines}
    assert shown == {name for name, field in Config.model_fields.items() if field.repr}
    assert "engine_factory" not in shown


def test_the_front_refuses_before_the_engine_would() -> None:
    config = load(None, {"max_running": "5", "max_waiting": "7", "max_waiting_tokens": "11"})
    limits = config.engine_limits()
    assert limits.max_waiting >= 12
    assert limits.max_waiting_tokens >= 11


def test_dense_copies_are_kept_in_what_is_computed_in_unless_told() -> None:
    for flags, dtype in (
        ({}, "bfloat16"),
        ({"dtype": "float32"}, "float32"),
        ({"merge_dtype": "float32"}, "float32"),
        ({"dtype": "float32", "merge_dtype": "bfloat16"}, "bfloat16"),
    ):
        assert load(None, flags).runner_config().merge_dtype == dtype


def test_an_adapter_may_have_no_more_virtual_tokens_than_are_set_aside() -> None:
    assert load(None, {"virtual_tokens": "100"}).adapter_virtual_tokens == 100
    assert load(None, {"max_virtual_tokens": "50"}).adapter_virtual_tokens == 50


def test_the_runner_takes_every_option_that_it_is_given() -> None:
    from loraplex_server.engine.runner.local import build

    setup = EngineSetup.parse(Config().engine_setup().command()[-1])
    assert setup == Config().engine_setup()
    assert isinstance(setup.runner, get_type_hints(build)["config"])


def test_every_setting_is_described_by_sentences_in_a_panel() -> None:
    assert next(iter(PANELS)) == ALL_SETTINGS[0], "settings before the first panel have none"
    assert PANELS.keys() <= set(ALL_SETTINGS)
    for name in ALL_SETTINGS:
        text = Config.model_fields[name].description or ""
        assert text[:1].isupper(), name
        assert text.endswith("."), name
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).stdout
    assert all(f"─ {title} ─" in shown for title in PANELS.values())
    assert all(f"--{name.replace('_', '-')} " in shown for name in ALL_SETTINGS)


def test_a_wrong_flag_ends_every_command_with_the_same_code(tmp_path: Path) -> None:
    for command in (
        ["serve", "--port", "x"],
        ["doctor", "--port", "x"],
        ["store", "ls", "--config", str(tmp_path / "none.toml")],
        ["export", "a", "--out", "b", "--format", "hf", "--config", str(tmp_path / "none.toml")],
    ):
        ended = CliRunner().invoke(app, command)
        assert ended.exit_code == ServerExit.BAD_CONFIG, ended.output
        assert ended.stderr.startswith("error: "), command


def test_the_largest_weights_file_is_a_setting_of_the_server_and_its_engines() -> None:
    assert load(None, {}).runner_config().max_adapter_file == 4 << 30
    assert load(None, {"max_adapter_file": "6GiB"}).runner_config().max_adapter_file == 6 << 30


@pytest.mark.parametrize("flag", ["--share-base-prefixes", "--no-share-base-prefixes"])
def test_a_setting_of_an_earlier_version_is_refused_with_its_new_name(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = CliRunner().invoke(app, ["serve", flag])
    assert found.exit_code == ServerExit.BAD_CONFIG
    assert "now called prefix_cache" in found.output
    assert "share-base" not in CliRunner().invoke(app, ["serve", "--help"]).output
    file = tmp_path / "server.toml"
    file.write_text("share_base_prefixes = false\n")
    with pytest.raises(ConfigError, match="now called prefix_cache"):
        load(file, {})
    monkeypatch.setenv("LORAPLEX_SHARE_BASE_PREFIXES", "")
    with pytest.raises(ConfigError, match="now called prefix_cache"):
        load(None, {})
