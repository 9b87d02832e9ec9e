"""The image starts what exists, as nobody in particular, and stops when it is told to.

There is no Docker engine in the test environment, so the Dockerfile is linted and read, not built.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from deploy.dashboard import ROOT

DOCKERFILE = ROOT / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) in order, with continued lines joined and comments dropped."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    text = re.sub(r"\\\n", " ", text)
    return [
        (word.upper(), re.sub(r"\s+", " ", rest.strip()))
        for word, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, after those of the stages that it starts from."""
    made: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for word, rest in instructions():
        if word == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            made[name] = current = list(made.get(parent, []))
        current.append((word, rest))
    return made


def environment(stage: list[tuple[str, str]]) -> dict[str, str]:
    pairs = [pair for word, rest in stage if word == "ENV" for pair in rest.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def last(stage: list[tuple[str, str]], instruction: str) -> str:
    return [rest for word, rest in stage if word == instruction][-1]


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_runs_unprivileged_and_gets_signals(target: str) -> None:
    stage = stages()[target]
    assert last(stage, "USER") == "10001:10001"
    assert json.loads(last(stage, "ENTRYPOINT")) == ["loraplex-server"]
    assert json.loads(last(stage, "CMD")) == ["serve"]
    health = last(stage, "HEALTHCHECK")
    assert json.loads(health[health.index("[") :]) == ["loraplex", "health"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {"loraplex", "loraplex-server"} <= set(scripts)


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_image_has_no_cpp_compiler_and_finds_the_kernels_that_were_built(target: str) -> None:
    every = stages()
    (built,) = re.findall(
        r"loraplex_model\.ops\.build --all --into (\S+)",
        " ".join(rest for _, rest in every["build"]),
    )
    assert environment(every[target])["LORAPLEX_KERNELS_DIR"] == built
    assert built.startswith(last(every[target], "COPY").split()[-1])
    installed = " ".join(rest for word, rest in every[target] if word == "RUN").split()
    assert "g++" not in installed
    # Triton compiles the code that launches its kernels.
    assert ("gcc" in installed) == (target == "cuda")


def test_what_is_copied_is_in_the_repository_and_in_the_build_context() -> None:
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for word, rest in instructions()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_base_images_can_be_pinned_by_the_operator() -> None:
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert set(bases) == {"${PYTHON_IMAGE}", "runtime"}
