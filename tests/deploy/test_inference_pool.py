"""An endpoint picker finds every family that its configuration names in a scrape of the server."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.dashboard import ROOT
from prometheus_client.parser import text_string_to_metric_families
from rpc.conftest import _engine_finds_the_oracle
from rpc.harness import ask, running

__all__ = ["_engine_finds_the_oracle"]

FILE = ROOT / "deploy/kubernetes/overlays/inference-pool/epp-config.yaml"
LORA_LABELS = {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}


@pytest.fixture(scope="module")
def plugins() -> dict[str, dict[str, Any]]:
    """The parameters of each plugin, by its name."""
    config = yaml.safe_load(FILE.read_text())
    assert config["kind"] == "EndpointPickerConfig"
    return {each.get("name", each["type"]): each for each in config["plugins"]}


def engine(plugins: dict[str, dict[str, Any]]) -> dict[str, Any]:
    parameters = plugins["loraplex-metrics"]["parameters"]
    (found,) = parameters["engineConfigs"]
    assert parameters["defaultEngine"] == found["name"] == "loraplex"
    return found


async def test_the_page_that_it_reads_has_the_families_and_labels_that_it_names(
    plugins: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    config, source = engine(plugins), plugins["metrics"]
    assert (source["type"], source["parameters"]["scheme"]) == ("metrics-data-source", "http")
    async with running(tmp_path) as up:
        await up.register("alpha", 1)
        await up.generation.Generate(ask(adapter="alpha"))
        url = f"http://{up.server.admin_address}{source['parameters']['path']}"

        def get() -> str:
            with urllib.request.urlopen(url, timeout=10) as reply:
                return reply.read().decode()

        page = await asyncio.to_thread(get)
    families = {f.name: f for f in text_string_to_metric_families(page)}
    specs = {key: value for key, value in config.items() if key.endswith("Spec")}
    specs |= {each["attributeKey"]: each["metricSpec"] for each in config["customMetrics"]}
    assert len(specs) == 6
    for key, spec in specs.items():
        assert re.fullmatch(r"[a-z_]+", spec), "without labels, all series are added up"
        assert families[spec].type == "gauge", key
        assert len(families[spec].samples) == 1, key
    assert 0 <= families[config["kvUsageSpec"]].samples[0].value <= 1
    (lora,) = families[config["loraSpec"]].samples
    assert lora.labels.keys() == LORA_LABELS
    assert lora.labels["running_lora_adapters"] == "alpha"
    assert int(lora.labels["max_lora"]) >= 1
    (cache,) = families[config["cacheInfoSpec"]].samples
    for key in ("cacheBlockSizeLabelName", "cacheNumBlocksLabelName"):
        assert int(cache.labels[config[key]]) > 0, key


def test_every_plugin_is_used_and_every_use_is_a_plugin() -> None:
    config = yaml.safe_load(FILE.read_text())
    named = [each.get("name", each["type"]) for each in config["plugins"]]
    assert len(named) == len(set(named))
    (profile,) = config["schedulingProfiles"]
    used = {each["pluginRef"] for each in profile["plugins"]}
    for source in config["dataLayer"]["sources"]:
        used |= {source["pluginRef"], *(each["pluginRef"] for each in source["extractors"])}
    assert set(named) - used == {"single-profile-handler"}, "which needs no reference"
    assert used <= set(named)
