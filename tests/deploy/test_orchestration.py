"""The Kubernetes base and the compose file fit the image and the server's configuration."""

from __future__ import annotations

import re

import pytest
import yaml
from deploy.dashboard import ROOT
from deploy.test_dockerfile import environment, last, stages
from loraplex_server.config import Config
from pydantic import TypeAdapter

BASE = ROOT / "deploy" / "kubernetes" / "base"


def documents() -> dict[tuple[str, str], dict]:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    found = [
        document
        for name in kustomization["resources"]
        for document in yaml.safe_load_all((BASE / name).read_text())
    ]
    return {(document["kind"], document["metadata"]["name"]): document for document in found}


@pytest.fixture(scope="module")
def pod() -> dict:
    return documents()["Deployment", "loraplex"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def server(pod: dict) -> dict:
    (container,) = pod["containers"]
    return container


@pytest.fixture(scope="module")
def configured() -> dict[str, str]:
    (generated,) = yaml.safe_load((BASE / "kustomization.yaml").read_text())["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generated["literals"])


def test_a_pod_has_time_to_drain(pod: dict, server: dict, configured: dict[str, str]) -> None:
    pause = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = float(configured["LORAPLEX_DRAIN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] > pause + drain


def settings_of(variables: dict[str, str]) -> dict[str, str]:
    """The server's settings among environment variables, without the others that we read."""
    others = {"LORAPLEX_KERNELS_DIR"}
    return {
        name.removeprefix("LORAPLEX_").lower(): value
        for name, value in variables.items()
        if name.startswith("LORAPLEX_") and name not in others
    }


def test_every_setting_that_is_deployed_exists_and_is_valid(configured: dict[str, str]) -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    deployed = {
        "kubernetes": {**environment(stages()["cpu"]), **configured},
        "cuda image": environment(stages()["cuda"]),
        "compose": {
            **environment(stages()["cpu"]),
            **compose["services"]["server"]["environment"],
        },
    }
    for where, variables in deployed.items():
        settings = settings_of(variables)
        assert settings.keys() <= Config.model_fields.keys(), where
        assert TypeAdapter(Config).validate_python(settings).port == 50051, where


def test_only_chosen_pods_reach_a_server_that_checks_nobody(configured: dict[str, str]) -> None:
    assert configured["LORAPLEX_INSECURE"] == "true"
    policy = documents()["NetworkPolicy", "loraplex"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    for rule in policy["ingress"]:
        assert all(peer.get("podSelector", {}).get("matchLabels") for peer in rule["from"])


def test_probes_ask_the_grpc_port(server: dict) -> None:
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["grpc"]["port"] == ports["grpc"]
    assert {str(port) for port in ports.values()} == set(last(stages()["cpu"], "EXPOSE").split())


def test_the_service_reaches_the_pods_ports(server: dict) -> None:
    names = {port["name"] for port in server["ports"]}
    service = documents()["Service", "loraplex"]
    assert {port["targetPort"] for port in service["spec"]["ports"]} == names


def test_selectors_find_the_pods() -> None:
    deployment = documents()["Deployment", "loraplex"]["spec"]
    labels = deployment["template"]["metadata"]["labels"].items()
    assert deployment["selector"]["matchLabels"].items() <= labels
    assert documents()["Service", "loraplex"]["spec"]["selector"].items() <= labels
    policy = documents()["NetworkPolicy", "loraplex"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels


def test_a_pod_is_locked_down_and_writes_only_to_its_volumes(pod: dict, server: dict) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    user, _, group = last(stages()["cpu"], "USER").partition(":")
    assert pod["securityContext"]["runAsUser"] == int(user)
    assert pod["securityContext"]["fsGroup"] == int(group)
    assert server["securityContext"]["readOnlyRootFilesystem"]
    assert server["securityContext"]["capabilities"]["drop"] == ["ALL"]
    mounts = {mount["mountPath"]: mount for mount in server["volumeMounts"]}
    image = environment(stages()["cpu"])
    assert not mounts[image["LORAPLEX_STORE"]].get("readOnly")
    assert not mounts[image["LORAPLEX_CACHE"]].get("readOnly")
    assert not mounts[image["LORAPLEX_TRAINING_JOBS_DIR"]].get("readOnly")
    assert mounts[image["LORAPLEX_IMPORT_ROOT"]]["readOnly"]
    assert not mounts["/tmp"].get("readOnly")


def test_every_volume_exists_and_is_mounted(pod: dict, server: dict) -> None:
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in server["volumeMounts"]} == names
    for volume in pod["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            assert ("PersistentVolumeClaim", claim["claimName"]) in documents()


def test_compose_publishes_ports_on_the_loopback_only() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} publishes {port}"


def test_compose_builds_a_target_and_mounts_folders_that_exist() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    assert compose["services"]["server"]["build"]["target"] in stages()
    assert compose["services"]["server"]["read_only"]
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / "deploy" / source).resolve().exists(), source
            else:
                assert source in compose["volumes"]


def test_compose_scrapes_the_service_that_it_starts() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    ((target,),) = [group["targets"] for group in job["static_configs"]]
    host, _, port = target.partition(":")
    assert host in compose["services"]
    assert port in last(stages()["cpu"], "EXPOSE").split()
    assert job["job_name"] in re.findall(
        r'job="(\w+)"', (ROOT / "deploy/prometheus/alerts.yml").read_text()
    )
