"""The Kubernetes base and every overlay fit the image and the server's configuration.

No cluster is at hand, so the overlays are rendered and their objects compared with each other, with
the schemas of Kubernetes and with the code.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from deploy.dashboard import ROOT
from deploy.manifests import FOLDERS, KUBERNETES, Rendered, containers, files, pods, render
from deploy.test_dockerfile import environment, last, stages
from loraplex.sources import AdapterAddress, AllowList
from loraplex_server.config import Config
from loraplex_server.runtime.shutdown import EXIT_SECONDS
from pydantic import SecretStr, TypeAdapter

VERSION = "1.34"
"""Version of Kubernetes with whose schemas the objects are compared."""

CORE_GROUPS = {
    "",
    "apps",
    "autoscaling",
    "networking.k8s.io",
    "policy",
    "rbac.authorization.k8s.io",
}
"""Groups of the objects that Kubernetes has itself; the others have tests of their own."""

WITH_TESTS = {"Certificate", "InferencePool", "PodMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds of objects that are defined by other projects; see test_custom_objects.py."""


@pytest.fixture(scope="module", params=FOLDERS)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    return render(request.param)


def test_every_object_of_kubernetes_is_valid(rendered: Rendered) -> None:
    for made in rendered.objects:
        group = made["apiVersion"].rpartition("/")[0]
        if group in CORE_GROUPS:
            kubernetes_validate.validate(made, VERSION, strict=True)
        else:
            assert made["kind"] in WITH_TESTS


def test_no_two_objects_have_one_name(rendered: Rendered) -> None:
    names = [(made["kind"], made["metadata"]["name"]) for made in rendered.objects]
    assert len(set(names)) == len(names)
    assert all("namespace" not in made["metadata"] for made in rendered.objects)


def settings_of(variables: dict[str, str]) -> dict[str, str]:
    """The server's settings among environment variables, without the others that we read."""
    others = {"LORAPLEX_KERNELS_DIR"}
    return {
        name.removeprefix("LORAPLEX_").lower(): value
        for name, value in variables.items()
        if name.startswith("LORAPLEX_")
        and not name.startswith("LORAPLEX_GATEWAY_")  # those of the gateway's process
        and name not in others
    }


def test_every_setting_that_is_deployed_exists_and_is_valid(rendered: Rendered) -> None:
    settings = settings_of(rendered.variables)
    assert settings.keys() <= Config.model_fields.keys()
    config = TypeAdapter(Config).validate_python(settings)
    assert config.port == 50051
    assert config.host == config.admin_host == "0.0.0.0"


def test_settings_cannot_be_replaced_by_variables_of_services(rendered: Rendered) -> None:
    # A Service called `loraplex` would set LORAPLEX_PORT.
    assert rendered.pod["enableServiceLinks"] is False


def test_no_secret_is_rendered_and_none_is_in_a_config_map(rendered: Rendered) -> None:
    assert not rendered.of("Secret")
    secret = {name for name, field in Config.model_fields.items() if field.annotation is SecretStr}
    assert secret
    for made in rendered.of("ConfigMap"):
        assert not settings_of(made.get("data", {})).keys() & secret
        assert not re.search(r"PRIVATE KEY|lpx_|://[^/\s]*:[^/\s]*@", str(made))


def test_every_secret_that_a_pod_needs_is_in_the_documents(rendered: Rendered) -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    needed = {name for name, _ in rendered.secret_variables.values()}
    for _, pod in pods(rendered):
        needed |= {v["secret"]["secretName"] for v in pod.get("volumes", []) if "secret" in v}
    for name in needed:
        assert f"`{name}`" in text, name


def test_callers_are_checked_or_only_chosen_pods_reach_the_server(rendered: Rendered) -> None:
    config = TypeAdapter(Config).validate_python(settings_of(rendered.variables))
    assert config.insecure != bool(config.principals and config.tls_certificate)
    policy = rendered.get("NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= rendered.labels.items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    for rule in policy["ingress"]:
        assert all(peer.get("podSelector", {}).get("matchLabels") for peer in rule["from"])


def test_the_server_may_connect_only_where_it_has_to(rendered: Rendered) -> None:
    policy = rendered.get("NetworkPolicy")["spec"]
    ports = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    wanted = set()
    if "LORAPLEX_STORE_URL" in rendered.variables:
        wanted |= {53, 5432}
    if "initContainers" in rendered.pod:
        wanted |= {53, 443}
    assert ports == wanted


def test_a_pod_has_time_to_drain(rendered: Rendered) -> None:
    pause = int(rendered.server["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = float(rendered.configured["LORAPLEX_DRAIN_TIMEOUT"])
    assert rendered.pod["terminationGracePeriodSeconds"] >= pause + drain + EXIT_SECONDS
    for _, pod in pods(rendered):
        assert pod["terminationGracePeriodSeconds"] > 30


def test_probes_ask_the_grpc_port_in_a_way_that_it_answers(rendered: Rendered) -> None:
    ports = {port["name"]: port["containerPort"] for port in rendered.server["ports"]}
    secure = "LORAPLEX_TLS_CERTIFICATE" in rendered.configured
    probes = {
        name: rendered.server[f"{name}Probe"] for name in ("startup", "readiness", "liveness")
    }
    for probe in probes.values():
        if secure:  # the kubelet's own probes do not speak TLS
            assert "grpc" not in probe
            program, command, *flags = probe["exec"]["command"]
            assert (program, command) == ("loraplex", "health")
            assert f"--server=localhost:{ports['grpc']}" in flags
        else:
            assert probe["grpc"]["port"] == ports["grpc"]
    exposed = set(last(stages()["cpu"], "EXPOSE").split())
    with_gateway = bool(rendered.variables.get("LORAPLEX_GATEWAY"))
    assert {str(port) for port in ports.values()} == exposed - (set() if with_gateway else {"8000"})
    patience = {
        name: probe["periodSeconds"] * probe["failureThreshold"] for name, probe in probes.items()
    }
    assert patience["startup"] >= 1200, "the first start with a large model"
    assert patience["liveness"] >= 300, "the server replaces a lost engine itself"
    assert patience["readiness"] <= 20


def test_the_commands_of_probes_exist() -> None:
    probes = [render(folder).server["readinessProbe"] for folder in FOLDERS]
    commands = {tuple(probe["exec"]["command"]) for probe in probes if "exec" in probe}
    assert commands
    for program, *words in commands:
        path = Path(sys.executable).with_name(program)
        done = subprocess.run([path, *words, "--help"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_command_that_fetches_a_model_exists() -> None:
    (container,) = render("overlays/model-from-hub").pod["initContainers"]
    program, *words = container["command"]
    path = Path(sys.executable).with_name(program)
    done = subprocess.run([path, *words, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    server = render("overlays/model-from-hub").server
    assert words[words.index("--local-dir") + 1] in {
        mount["mountPath"] for mount in server["volumeMounts"] if mount["name"] == "model"
    }
    assert container["image"] == server["image"]


def test_the_command_that_fetches_an_adapter_fills_the_watched_directory() -> None:
    rendered = render("overlays/adapters-from-hub")
    (container,) = rendered.pod["initContainers"]
    program, *words = container["command"]
    path = Path(sys.executable).with_name(program)
    done = subprocess.run([path, *words, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    environment = {each["name"]: each.get("value") for each in rendered.server["env"]}
    watched = environment["LORAPLEX_ADAPTER_DIRECTORY"]
    assert words[words.index("--into") + 1] == watched
    mounted = {mount["mountPath"]: mount for mount in rendered.server["volumeMounts"]}
    assert mounted[watched]["readOnly"]
    assert container["image"] == rendered.server["image"]
    given = {each["name"]: each.get("value") for each in container["env"]}
    assert AdapterAddress.parse(given["ADAPTER"]) in AllowList(given["LORAPLEX_PULL_ALLOW"].split())


def test_services_reach_the_ports_of_pods(rendered: Rendered) -> None:
    pods_of = {d["metadata"]["name"]: d["spec"]["template"] for d in rendered.of("Deployment")}
    for service in rendered.of("Service"):
        template = pods_of[service["metadata"]["name"]]
        assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
        names = {port["name"] for c in template["spec"]["containers"] for port in c["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_selectors_find_the_pods(rendered: Rendered) -> None:
    labels = rendered.labels.items()
    assert rendered.deployment["selector"]["matchLabels"].items() <= labels
    for budget in rendered.of("PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    for spread in rendered.pod.get("topologySpreadConstraints", []):
        assert spread["labelSelector"]["matchLabels"].items() <= labels


def test_pods_are_locked_down(rendered: Rendered) -> None:
    # The profile `restricted` of the Pod Security Standards, and a root that cannot be written.
    for name, pod in pods(rendered):
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert all("hostPath" not in volume for volume in pod["volumes"])
        for container in containers(pod):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"], container["name"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
    assert rendered.pod["automountServiceAccountToken"] is False


def test_the_server_writes_only_to_its_volumes(rendered: Rendered) -> None:
    user, _, group = last(stages()[rendered.target], "USER").partition(":")
    assert rendered.pod["securityContext"]["runAsUser"] == int(user)
    assert rendered.pod["securityContext"]["fsGroup"] == int(group)
    mounts = {mount["mountPath"]: mount for mount in rendered.server["volumeMounts"]}
    image = environment(stages()[rendered.target])
    for setting in ("LORAPLEX_STORE", "LORAPLEX_CACHE", "LORAPLEX_TRAINING_JOBS_DIR"):
        assert not mounts[image[setting]].get("readOnly")
    assert not mounts["/tmp"].get("readOnly")
    assert mounts[image["LORAPLEX_IMPORT_ROOT"]]["readOnly"]
    assert mounts[rendered.configured["LORAPLEX_MODEL"]]["readOnly"]


def test_every_file_that_a_setting_names_is_mounted(rendered: Rendered) -> None:
    mounts = [mount["mountPath"] for mount in rendered.server["volumeMounts"]]
    for name, value in settings_of(rendered.configured).items():
        if value.startswith("/"):
            assert any(value == mount or value.startswith(f"{mount}/") for mount in mounts), name


def test_every_volume_exists_and_is_mounted(rendered: Rendered) -> None:
    for _, pod in pods(rendered):
        names = [volume["name"] for volume in pod["volumes"]]
        assert len(set(names)) == len(names)
        used = {mount["name"] for c in containers(pod) for mount in c["volumeMounts"]}
        assert used == set(names)
        for volume in pod["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                rendered.get("PersistentVolumeClaim", claim["claimName"])
            if source := volume.get("configMap"):
                rendered.get("ConfigMap", source["name"])


def test_secrets_are_readable_for_the_group_only(rendered: Rendered) -> None:
    # Volumes of Secrets belong to root, and to the pod's group; the server refuses more.
    for volume in rendered.pod["volumes"]:
        if "secret" in volume:
            assert volume["secret"]["defaultMode"] == 0o440


def test_every_claim_is_used(rendered: Rendered) -> None:
    used = {v.get("persistentVolumeClaim", {}).get("claimName") for v in rendered.pod["volumes"]}
    assert {claim["metadata"]["name"] for claim in rendered.of("PersistentVolumeClaim")} <= used


def test_several_pods_share_what_they_can_and_one_pod_leaves_before_the_next(
    rendered: Rendered,
) -> None:
    modes = {tuple(c["spec"]["accessModes"]) for c in rendered.of("PersistentVolumeClaim")}
    strategy = rendered.deployment["strategy"]
    shared = "LORAPLEX_STORE_URL" in rendered.secret_variables
    assert rendered.has_several_pods == shared
    if shared:
        assert modes == {("ReadWriteMany",)}
        assert strategy == {
            "type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}
        }  # fmt: skip
        assert rendered.of("PodDisruptionBudget")
        assert "LORAPLEX_TRAINING" not in rendered.configured, "its directory is one server's"
    else:
        assert modes == {("ReadWriteOnce",)}
        assert strategy == {"type": "Recreate"}


def test_jobs_of_training_outlive_the_pod(rendered: Rendered) -> None:
    (volume,) = [v for v in rendered.pod["volumes"] if v["name"] == "training"]
    trains = rendered.configured.get("LORAPLEX_TRAINING") == "true"
    assert ("persistentVolumeClaim" in volume) == trains
    assert ("emptyDir" in volume) != trains


def test_an_autoscaler_decides_alone_how_many_pods_there_are(rendered: Rendered) -> None:
    scaled = rendered.of("HorizontalPodAutoscaler") + rendered.of("ScaledObject")
    assert len(scaled) <= 1
    assert ("replicas" in rendered.deployment) != bool(scaled)


def test_gpus_are_asked_for_with_the_image_that_uses_them(rendered: Rendered) -> None:
    limits = rendered.server["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == (rendered.target == "cuda")
    image = environment(stages()[rendered.target])
    assert image["LORAPLEX_DEVICE"] == rendered.target


def test_every_file_is_rendered_somewhere() -> None:
    kustomizations = [path for path in files() if path.name == "kustomization.yaml"]
    named = set(kustomizations)
    for path in kustomizations:
        made = yaml.safe_load(path.read_text())
        for name in (*made.get("resources", []), *made.get("components", [])):
            named.add((path.parent / name).resolve())
            named.add((path.parent / name / "kustomization.yaml").resolve())
        named |= {path.parent / each["path"] for each in made.get("patches", []) if "path" in each}
        for generator in made.get("configMapGenerator", []):
            named |= {path.parent / name for name in generator.get("files", [])}
    assert set(files()) <= named
    used = {path.parent for path in named if path.parent.parent.name == "components"}
    in_overlays = {
        (KUBERNETES / folder / name).resolve()
        for folder in FOLDERS[1:]
        for name in yaml.safe_load((KUBERNETES / folder / "kustomization.yaml").read_text())[
            "components"
        ]
    }
    assert used == in_overlays, "a component that no overlay renders is not tested"
