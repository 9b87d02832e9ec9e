"""The page about the gateway, its specification and its code agree."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from docs.test_documents import table
from loraplex_gateway import cli
from loraplex_gateway.app import build
from loraplex_gateway.chat.request import ChatRequest
from loraplex_gateway.completions.request import CompletionRequest
from loraplex_gateway.embeddings.request import EmbeddingRequest
from loraplex_gateway.generation.parameters import SamplingFields
from loraplex_gateway.responses.request import ResponseRequest
from loraplex_gateway.settings import GatewaySettings
from loraplex_gateway.tokens.request import DetokenizeRequest, TokenizeRequest
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import Route

from deploy import exposition
from gateway import specification

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "gateway.md").read_text()


def test_the_specification_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(specification.document()).validate()


def test_no_key_of_the_specification_is_given_twice() -> None:
    """Readers of YAML take the last one in silence, or refuse the file."""
    waiting: list[yaml.Node] = [yaml.compose(specification.FILE.read_text("utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value]
            twice = {key for key in keys if keys.count(key) > 1}
            assert not twice, f"{node.start_mark}: {twice}"
            waiting += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def operations() -> set[tuple[str, str]]:
    return {
        (method.upper(), path)
        for path, item in specification.document()["paths"].items()
        for method in item
        if method != "parameters" and not _is_page(path)
    }


def _is_page(path: str) -> bool:
    """Whether a path is the console's, which is no interface for programs."""
    return path == "/" or path.split("/")[1] == "console"


def test_every_route_is_specified_and_every_operation_exists() -> None:
    routes = {
        (method, re.sub(r"\{(\w+):\w+\}", r"{\1}", route.path))
        for route in build(GatewaySettings()).routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
        if route.include_in_schema and not _is_page(route.path)
    }
    assert operations() == routes


def test_every_operation_declares_its_errors() -> None:
    for path, item in specification.document()["paths"].items():
        for method, found in item.items():
            if method == "parameters" or _is_page(path):
                continue
            assert found["operationId"], path
            if "200" not in found["responses"]:
                continue  # an operation that is always refused
            assert "500" in found["responses"] or path == "/version", path
            if found.get("requestBody"):
                assert {"400", "401", "413", "503"} <= found["responses"].keys(), path
                if "application/json" in found["requestBody"]["content"]:
                    assert {"408", "415"} <= found["responses"].keys(), path


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SamplingFields, "Sampling"),
        (ChatRequest, "ChatRequest"),
        (CompletionRequest, "CompletionRequest"),
        (EmbeddingRequest, "EmbeddingRequest"),
        (ResponseRequest, "ResponseRequest"),
    ],
)
def test_every_field_of_a_request_is_specified(kind: type, name: str) -> None:
    schemas = specification.document()["components"]["schemas"]
    parts = [schemas[name], *schemas[name].get("allOf", [])]
    parts += [schemas["Sampling"]] if issubclass(kind, SamplingFields) else []
    specified = {field for part in parts for field in part.get("properties", {})}
    assert specified == set(kind.__struct_encode_fields__)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("kind", "path"), [(TokenizeRequest, "/tokenize"), (DetokenizeRequest, "/detokenize")]
)
def test_every_field_about_tokens_is_specified(kind: type, path: str) -> None:
    body = specification.document()["paths"][path]["post"]["requestBody"]["content"]
    specified = body["application/json"]["schema"]["properties"]
    assert set(specified) == set(kind.__struct_encode_fields__)  # type: ignore[attr-defined]


def test_the_table_of_metrics_is_the_codes() -> None:
    documented = {name: cells[0] for name, cells in table(PAGE, "gateway metric").items()}
    assert documented == exposition.gateway_families()


def test_the_table_of_flags_is_the_codes() -> None:
    rows = table(PAGE, "flag")
    documented = {flag for row in rows for flag in re.findall(r"--(?!no-)[a-z-]+", row)}
    flags = {f"--{name.replace('_', '-')}" for name in inspect.signature(cli.run).parameters}
    assert documented == flags


def test_every_path_of_the_page_is_specified() -> None:
    operation = re.compile(r"((?:GET|POST|DELETE)) (/[\w/{}.]+)")
    named = {found for row in table(PAGE, "path") for found in operation.findall(row)}
    assert named
    specified = {(method, path.replace("{model}", "{id}")) for method, path in operations()}
    assert named <= specified
