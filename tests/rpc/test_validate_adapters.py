"""The bounds of AdapterService's requests; everything that is wrong is told at once."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from loraplex.v1 import adapter_pb2 as pb
from loraplex_model.base.refusal import Problem
from loraplex_server.rpc.messages import validate_adapters as validate

DIGEST = "sha256:" + "0" * 64


def fields(violations: list[Problem]) -> list[str]:
    return [violation.field for violation in violations]


def test_a_registration() -> None:
    wrong = pb.RegisterAdapterRequest(name="A", path="", labels={"Key": "v", "k": "x" * 257})
    assert sorted(fields(validate.register(wrong))) == ["labels[Key]", "labels[k]", "name", "path"]
    good = pb.RegisterAdapterRequest(name="a", path="b", labels={"team/x": "", "k.9": "v" * 256})
    assert validate.register(good) == []
    many = pb.RegisterAdapterRequest(name="a", path="b", labels={f"k{i}": "" for i in range(33)})
    assert fields(validate.register(many)) == ["labels"]


def test_a_page() -> None:
    page = pb.ListAdaptersRequest(page_size=1001, page_token="x" * 513, labels={"!": ""})
    assert fields(validate.page(page)) == ["page_size", "page_token", "labels[!]"]


def test_ids_and_names() -> None:
    assert fields(validate.adapter_id("")) == ["adapter_id"]
    assert fields(validate.name("a@1")) == ["name"]
    assert fields(validate.name("a@1", "alias")) == ["alias"]
    assert fields(validate.upload_id("../x")) == ["upload_id"]
    assert validate.upload_id("0" * 32) == []


@pytest.mark.parametrize("seconds", [-1, 86_401])
def test_a_drain(seconds: int) -> None:
    request = pb.UnloadAdapterRequest(adapter_id="a", drain=Duration(seconds=seconds))
    assert fields(validate.unload(request)) == ["drain"]
    assert validate.unload(pb.UnloadAdapterRequest(adapter_id="a", drain=Duration())) == []


def test_labels_to_change() -> None:
    assert fields(validate.label(pb.LabelAdapterRequest(adapter_id="a"))) == ["set"]
    both = pb.LabelAdapterRequest(adapter_id="a", set={"k": "v"}, remove=["k"])
    assert fields(validate.label(both)) == ["remove"]
    assert fields(validate.label(pb.LabelAdapterRequest(adapter_id="a", remove=["K"]))) == [
        "remove[K]"
    ]


def test_an_alias() -> None:
    wrong = pb.SetAliasRequest(alias="A", adapter_id="", expected="x@")
    assert fields(validate.alias(wrong)) == ["alias", "adapter_id", "expected"]
    assert validate.alias(pb.SetAliasRequest(alias="a", adapter_id="b", expected="")) == []


def header(**changes: object) -> pb.UploadHeader:
    good = {"upload_id": "0" * 32, "name": "a", "config_size": 1, "weights_size": 1}
    return pb.UploadHeader(**{**good, **changes})


def test_the_header_of_an_upload() -> None:
    assert validate.header(header(), 10) == []
    assert validate.header(header(expected_digest=DIGEST), 10) == []
    assert validate.header(header(stage_only=True, name=""), 10) == []
    wrong = header(
        upload_id="", name="", config_size=(1 << 20) + 1, weights_size=11, expected_digest="x"
    )
    assert fields(validate.header(wrong, 10)) == [
        "header.upload_id",
        "header.name",
        "header.config_size",
        "header.weights_size",
        "header.expected_digest",
    ]
    texts = {problem.field: problem.message for problem in validate.header(wrong, 10)}
    assert texts["header.config_size"].startswith("adapter_config.json has 1048577 bytes")
    assert "max_adapter_file" in texts["header.weights_size"]
    staged = header(stage_only=True, replace=True, load=True, labels={"k": "v"})
    assert fields(validate.header(staged, 10)) == [
        "header.name",
        "header.replace",
        "header.load",
        "header.labels",
    ]


def test_a_chunk() -> None:
    good = pb.UploadChunk(file=pb.ADAPTER_FILE_WEIGHTS, data=bytes(1 << 20))
    assert validate.chunk(good) == []
    assert fields(validate.chunk(pb.UploadChunk(data=bytes((1 << 20) + 1)))) == [
        "chunk.file",
        "chunk.data",
    ]


def test_a_dry_run() -> None:
    assert fields(validate.validation(pb.ValidateAdapterRequest())) == ["source"]
    assert fields(validate.validation(pb.ValidateAdapterRequest(path=""))) == ["path"]
    assert fields(validate.validation(pb.ValidateAdapterRequest(upload_id="a b"))) == ["upload_id"]
