"""The application for Ray Serve names calls that exist. `make try-ray` runs it, which needs Ray."""

from __future__ import annotations

import ast
from importlib import import_module

import yaml
from deploy.dashboard import ROOT
from loraplex.v1 import adapter_pb2, generation_pb2

FOLDER = ROOT / "deploy" / "ray"
SERVED = {
    "generation_pb2_grpc": generation_pb2.DESCRIPTOR.services_by_name["GenerationService"],
    "adapter_pb2_grpc": adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"],
}


def test_the_proxy_serves_services_that_exist() -> None:
    config = yaml.safe_load((FOLDER / "serve.yaml").read_text())
    functions = config["grpc_options"]["grpc_servicer_functions"]
    assert {name.split(".")[-2] for name in functions} == SERVED.keys()
    for name in functions:
        module, _, function = name.rpartition(".")
        assert callable(getattr(import_module(module), function))
    (application,) = config["applications"]
    module, _, function = application["import_path"].partition(":")
    tree = ast.parse((FOLDER / f"{module}.py").read_text())
    assert function in {getattr(node, "name", "") for node in tree.body}


def test_the_ingress_has_every_generation_and_every_call_about_the_store() -> None:
    tree = ast.parse((FOLDER / "application.py").read_text())
    (ingress,) = [node for node in tree.body if getattr(node, "name", "") == "Ingress"]
    methods = {getattr(node, "name", "") for node in ingress.body}
    assert set(SERVED["generation_pb2_grpc"].methods_by_name) <= methods
    (table,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FORWARDED"
    ]
    calls = SERVED["adapter_pb2_grpc"].methods_by_name
    # The others concern the memory of one server, or are streams.
    of_one_server = {
        "LoadAdapter", "UnloadAdapter", "PinAdapter", "UnpinAdapter", "MergeAdapter",
        "UnmergeAdapter", "StartUpload", "UploadAdapter", "GetUpload", "ListUploads",
        "AbortUpload", "WatchAdapters",
    }  # fmt: skip
    assert {key.value for key in table.keys} == set(calls) - of_one_server
    for key, reply in zip(table.keys, table.values, strict=True):
        assert ast.unparse(reply) == f"adapter_pb2.{calls[key.value].output_type.name}"
