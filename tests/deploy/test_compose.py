"""The compose files fit the image and the server's configuration.

No container engine is at hand: compose merges the files, and they are compared with the code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.dashboard import ROOT
from deploy.test_dockerfile import environment, last, stages
from deploy.test_orchestration import settings_of
from loraplex_server.config import Config
from pydantic import TypeAdapter

DEPLOY = ROOT / "deploy"
PROFILES = {"cpu": "server-cpu", "gpu": "server-gpu"}


class Loader(yaml.SafeLoader):
    """Reads compose's tag `!override` as the value that it marks."""


Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def load(name: str) -> dict[str, Any]:
    return yaml.load((DEPLOY / name).read_text(), Loader)


def merged(*names: str, profile: str) -> dict[str, Any]:
    """What compose makes of the files; skips the test if it is not installed."""
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed, so the files cannot be merged")
    files = [word for name in names for word in ("--file", str(DEPLOY / name))]
    done = subprocess.run(
        [program, *files, "--profile", profile, "config", "--format=json"],
        env={**os.environ, "GRAFANA_PASSWORD": "x"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "level=warning" not in done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("profile", PROFILES)
def test_compose_reads_the_files_as_they_are_meant(profile: str) -> None:
    name = PROFILES[profile]
    plain = merged("compose.yaml", profile=profile)
    assert set(plain["services"]) == {name, "prometheus", "grafana"}
    published = plain["services"][name]["ports"]
    assert {(port["host_ip"], port["published"]) for port in published} == {
        ("127.0.0.1", "50051"),
        ("127.0.0.1", "8000"),
    }
    checked = merged("compose.yaml", "compose.access.yaml", profile=profile)
    server = checked["services"][name]
    assert not any("host_ip" in port for port in server["ports"])
    assert {port["published"] for port in server["ports"]} == {"50051", "8000"}
    given = {secret["source"] for secret in server["secrets"]}
    assert given == set(checked["secrets"])
    environment = {**plain["services"][name]["environment"], **server["environment"]}
    assert environment == server["environment"], "what is not replaced stays"
    assert server["read_only"]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load("compose.yaml")


@pytest.fixture(scope="module")
def access() -> dict[str, Any]:
    return load("compose.access.yaml")


def test_every_profile_starts_one_server_of_its_target(compose: dict[str, Any]) -> None:
    servers = {name: each for name, each in compose["services"].items() if "profiles" in each}
    assert set(servers) == set(PROFILES.values())
    for profile, name in PROFILES.items():
        server = servers[name]
        assert server["profiles"] == [profile]
        assert server["build"]["target"] in stages()
        device = environment(stages()[server["build"]["target"]])["LORAPLEX_DEVICE"]
        assert (device == "cuda") == (profile == "gpu")
        devices = server.get("deploy", {}).get("resources", {}).get("reservations", {})
        assert bool(devices) == (profile == "gpu")
        if devices:
            ((wanted,),) = devices.values()
            assert wanted == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


@pytest.mark.parametrize("name", PROFILES.values())
def test_every_setting_exists_and_is_valid(
    compose: dict[str, Any], access: dict[str, Any], name: str
) -> None:
    server = compose["services"][name]
    image = environment(stages()[server["build"]["target"]])
    open_ = {**image, **server["environment"]}
    checked = {**open_, **access["services"][name]["environment"]}
    for variables in (open_, checked):
        settings = settings_of(variables)
        assert settings.keys() <= Config.model_fields.keys()
        assert TypeAdapter(Config).validate_python(settings).port == 50051
    assert settings_of(open_)["insecure"] == "true"
    assert settings_of(checked)["insecure"] == "false"


def test_only_a_server_that_checks_who_calls_is_published(
    compose: dict[str, Any], access: dict[str, Any]
) -> None:
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"
    for name in PROFILES.values():
        ports = access["services"][name]["ports"]
        assert ports == ["50051:50051", "8000:8000"], "metrics are not published"
        assert access["services"][name]["environment"]["LORAPLEX_GATEWAY_METRICS"] == ""


def test_secrets_are_files_that_the_server_is_given_and_told_of(access: dict[str, Any]) -> None:
    for name in PROFILES.values():
        service = access["services"][name]
        assert set(service["secrets"]) == set(access["secrets"])
        told = re.findall(r"/run/secrets/([\w.]+)", str(service))
        assert set(told) == set(access["secrets"])
    for secret in access["secrets"].values():
        assert Path(secret["file"]).parent == Path("secrets")
        assert not (DEPLOY / secret["file"]).exists(), "no secret is in the repository"
    assert "deploy/secrets/" in (ROOT / ".gitignore").read_text().split()


def test_the_server_is_locked_down_and_has_time_to_drain(compose: dict[str, Any]) -> None:
    for name in PROFILES.values():
        server = compose["services"][name]
        assert server["read_only"]
        assert server["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in server["security_opt"]
        assert int(server["stop_grace_period"].removesuffix("s")) > 30 + 20


def test_mounted_folders_and_volumes_exist(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).resolve().exists(), source
            else:
                assert source in compose["volumes"]


def test_every_other_service_says_whether_it_is_healthy(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        in_image = name in PROFILES.values() and last(stages()["cpu"], "HEALTHCHECK")
        assert in_image or service["healthcheck"]["test"][0] == "CMD"
        for other, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert other in compose["services"]


def test_prometheus_scrapes_the_server_of_either_profile(compose: dict[str, Any]) -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    alerts = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    jobs = config["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["loraplex", "loraplex-gateway"]
    for job in jobs:
        ((target,),) = [group["targets"] for group in job["static_configs"]]
        host, _, port = target.partition(":")
        for name in PROFILES.values():
            service = compose["services"][name]
            assert host in service["networks"]["default"]["aliases"]
            if job["job_name"] == "loraplex-gateway":
                assert port == service["environment"]["LORAPLEX_GATEWAY"].rpartition(":")[2]
                assert host in service["environment"]["LORAPLEX_GATEWAY_ALLOWED_HOST"].split()
            else:
                assert port in last(stages()["cpu"], "EXPOSE").split()
        assert job["job_name"] in re.findall(r'job="([\w-]+)"', alerts)
