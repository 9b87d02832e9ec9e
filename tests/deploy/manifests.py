"""The Kubernetes overlays as kustomize renders them, with what the tests ask of their objects."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.dashboard import ROOT
from deploy.test_dockerfile import environment, stages

KUBERNETES = ROOT / "deploy" / "kubernetes"
FOLDERS = ["base", *sorted(f"overlays/{path.name}" for path in (KUBERNETES / "overlays").iterdir())]
"""The base and every overlay, as folders below deploy/kubernetes."""

Object = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """All objects of an overlay."""

    folder: str
    objects: tuple[Object, ...]

    def of(self, kind: str) -> list[Object]:
        """Every object of a kind."""
        return [made for made in self.objects if made["kind"] == kind]

    def get(self, kind: str, name: str = "loraplex") -> Object:
        """The one object of this kind and name."""
        (found,) = [made for made in self.of(kind) if made["metadata"]["name"] == name]
        return found

    @property
    def deployment(self) -> Object:
        """The specification of the server's Deployment."""
        return self.get("Deployment")["spec"]

    @property
    def pod(self) -> Object:
        """The specification of the server's pods."""
        return self.deployment["template"]["spec"]

    @property
    def labels(self) -> dict[str, str]:
        """The labels of the server's pods."""
        return self.deployment["template"]["metadata"]["labels"]

    @property
    def server(self) -> Object:
        """The server's container."""
        (container,) = self.pod["containers"]
        return container

    @property
    def target(self) -> str:
        """The target of the Dockerfile that the image is."""
        name, _, tag = self.server["image"].partition(":")
        assert name == "loraplex"
        return tag

    @property
    def configured(self) -> dict[str, str]:
        """The variables of the server that are in its ConfigMap."""
        ((reference,),) = [source.values() for source in self.server["envFrom"]]
        return self.get("ConfigMap", reference["name"])["data"]

    @property
    def secret_variables(self) -> dict[str, tuple[str, str]]:
        """The variables of the server that come from a Secret: its name and the key in it."""
        return {
            entry["name"]: (source["name"], source["key"])
            for entry in self.server.get("env", [])
            if (source := entry.get("valueFrom", {}).get("secretKeyRef"))
        }

    @property
    def variables(self) -> dict[str, str]:
        """Every variable of the server, those of its image included; what is secret is made up."""
        secrets = dict.fromkeys(self.secret_variables, "postgresql://user:made-up@host/database")
        return {**environment(stages()[self.target]), **self.configured, **secrets}

    @property
    def has_several_pods(self) -> bool:
        """Whether more than one server runs at a time."""
        return self.deployment.get("replicas", 2) > 1


def pods(rendered: Rendered) -> Iterator[tuple[str, Object]]:
    """The name and the specification of every kind of pod."""
    for deployment in rendered.of("Deployment"):
        yield deployment["metadata"]["name"], deployment["spec"]["template"]["spec"]


def containers(pod: Object) -> list[Object]:
    """Every container of a pod, those that run before the others included."""
    return [*pod.get("initContainers", []), *pod["containers"]]


@cache
def render(folder: str) -> Rendered:
    """Renders an overlay; skips the test if there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed, so the overlays cannot be rendered")
    done = subprocess.run(
        [kubectl, "kustomize", str(KUBERNETES / folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return Rendered(folder, tuple(yaml.safe_load_all(done.stdout)))


def files() -> list[Path]:
    """Every file below deploy/kubernetes."""
    return [path for path in KUBERNETES.rglob("*") if path.is_file()]
