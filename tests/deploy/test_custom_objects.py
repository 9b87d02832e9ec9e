"""Objects of other projects in the overlays: what they name exists, and they have what they need.

Their schemas are in those projects, so the fields that each kind requires are written down here.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import yaml
from deploy.dashboard import DASHBOARD, ROOT
from deploy.manifests import FOLDERS, Rendered, render

from deploy import exposition

Object = dict[str, Any]


def all_of(kind: str) -> list[tuple[Rendered, Object]]:
    found = [(made, each) for made in map(render, FOLDERS) for each in made.of(kind)]
    assert found, f"no overlay has a {kind}"
    return found


def test_the_pod_monitor_scrapes_the_pods_under_the_name_that_the_alerts_use() -> None:
    for rendered, made in all_of("PodMonitor"):
        assert made["apiVersion"] == "monitoring.coreos.com/v1"
        assert made["spec"]["selector"]["matchLabels"].items() <= rendered.labels.items()
        (endpoint,) = made["spec"]["podMetricsEndpoints"]
        ports = {port["name"]: port["containerPort"] for port in rendered.server["ports"]}
        assert ports[endpoint["port"]] == 9464
        job = rendered.labels[made["spec"]["jobLabel"]]
        alerts = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
        assert set(re.findall(r'job="(\w+)"', alerts)) == {job}


def test_the_rules_of_the_operator_are_those_of_prometheus() -> None:
    source = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    for _, made in all_of("PrometheusRule"):
        assert made["apiVersion"] == "monitoring.coreos.com/v1"
        assert made["spec"] == source
    script = ROOT / "scripts" / "prometheus_rule.py"
    assert subprocess.run([sys.executable, script, "--check"]).returncode == 0


def test_the_dashboards_are_those_of_grafana() -> None:
    for rendered, _ in all_of("PodMonitor"):
        boards = [
            made
            for made in rendered.of("ConfigMap")
            if made["metadata"].get("labels", {}).get("grafana_dashboard") == "1"
        ]
        shown = {name: text for made in boards for name, text in made["data"].items()}
        assert shown == {path.name: path.read_text() for path in DASHBOARD.parent.glob("*.json")}
        # Beyond this size `kubectl apply` cannot keep the last state in an annotation.
        assert all(len(str(made)) < 256 << 10 for made in boards)


def test_autoscalers_scale_the_server_by_metrics_that_it_has() -> None:
    known = exposition.series_names()
    for rendered, made in all_of("HorizontalPodAutoscaler"):
        reference = made["spec"]["scaleTargetRef"]
        assert reference == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "loraplex"}
        rendered.get("Deployment", reference["name"])
        assert {each["pods"]["metric"]["name"] for each in made["spec"]["metrics"]} <= known
        assert 2 <= made["spec"]["minReplicas"] < made["spec"]["maxReplicas"]
    for rendered, made in all_of("ScaledObject"):
        assert made["apiVersion"] == "keda.sh/v1alpha1"
        rendered.get("Deployment", made["spec"]["scaleTargetRef"]["name"])
        (trigger,) = made["spec"]["triggers"]
        assert trigger["type"] == "prometheus"
        assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold"}
        assert exposition.mentioned(trigger["metadata"]["query"])
        assert exposition.mentioned(trigger["metadata"]["query"]) <= known
        assert 2 <= made["spec"]["minReplicaCount"] < made["spec"]["maxReplicaCount"]


def test_certificates_make_the_secrets_that_pods_mount() -> None:
    for rendered, made in all_of("Certificate"):
        assert made["apiVersion"] == "cert-manager.io/v1"
        spec = made["spec"]
        mounted = {
            volume["secret"]["secretName"]: volume["name"]
            for volume in rendered.pod["volumes"]
            if "secret" in volume
        }
        assert spec["issuerRef"] == {"name": "loraplex-ca", "kind": "Issuer"}
        used_by_probes = mounted[spec["secretName"]] == "probe"
        assert spec["usages"] == (["client auth"] if used_by_probes else ["server auth"])
        if used_by_probes:
            assert spec["commonName"]
        else:
            (target,) = [
                flag.removeprefix("--server=").partition(":")[0]
                for flag in rendered.server["readinessProbe"]["exec"]["command"]
                if flag.startswith("--server=")
            ]
            services = {each["metadata"]["name"] for each in rendered.of("Service")}
            assert set(spec["dnsNames"]) == {target, *services}


def test_the_pool_is_of_the_servers_and_its_picker_is_there() -> None:
    for rendered, made in all_of("InferencePool"):
        assert made["apiVersion"] == "inference.networking.k8s.io/v1"
        spec = made["spec"]
        assert spec["selector"]["matchLabels"].items() <= rendered.labels.items()
        ports = {port["name"]: port["containerPort"] for port in rendered.server["ports"]}
        assert spec["targetPorts"] == [{"number": ports["grpc"]}]
        assert spec["appProtocol"] == "kubernetes.io/h2c"
        picker = spec["endpointPickerRef"]
        service = rendered.get("Service", picker["name"])
        assert picker["port"]["number"] in {port["port"] for port in service["spec"]["ports"]}
        assert picker["failureMode"] == "FailOpen"


def test_the_picker_reads_the_configuration_that_it_is_given_and_the_metrics_that_exist() -> None:
    for rendered, pool in all_of("InferencePool"):
        pod = rendered.get("Deployment", pool["spec"]["endpointPickerRef"]["name"])["spec"][
            "template"
        ]
        (container,) = pod["spec"]["containers"]
        flags = dict(flag.removeprefix("--").split("=", 1) for flag in container["args"])
        assert flags["pool-name"] == pool["metadata"]["name"]
        folder, _, file = flags["config-file"].rpartition("/")
        (mount,) = [each for each in container["volumeMounts"] if each["mountPath"] == folder]
        (volume,) = [each for each in pod["spec"]["volumes"] if each["name"] == mount["name"]]
        text = rendered.get("ConfigMap", volume["configMap"]["name"])["data"][file]
        config = yaml.safe_load(text)
        assert config["kind"] == "EndpointPickerConfig"
        assert exposition.mentioned(text)
        assert exposition.mentioned(text) <= exposition.series_names()
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert ports["grpc"] == int(flags["grpc-port"])
        assert container["readinessProbe"]["grpc"]["port"] == int(flags["grpc-health-port"])
        # The network policy lets it read the metrics of the pods.
        assert pod["metadata"]["labels"]["loraplex-scraper"] == "true"


def test_the_picker_may_read_what_it_watches_and_nothing_else() -> None:
    for rendered, pool in all_of("InferencePool"):
        name = pool["spec"]["endpointPickerRef"]["name"]
        pod = rendered.get("Deployment", name)["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] == rendered.get("ServiceAccount", name)["metadata"]["name"]
        binding = rendered.get("RoleBinding", name)
        assert binding["roleRef"]["name"] == rendered.get("Role", name)["metadata"]["name"]
        assert [subject["name"] for subject in binding["subjects"]] == [name]
        for rule in rendered.get("Role", name)["rules"]:
            assert set(rule["verbs"]) == {"get", "list", "watch"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_scraped_twice(folder: str) -> None:
    # The annotations are for clusters without the operator, which does not read them.
    rendered = render(folder)
    assert len(rendered.of("PodMonitor")) <= 1
