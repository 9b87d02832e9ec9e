"""The examples of docs/clients.md are read as they stand there."""

from __future__ import annotations

from pathlib import Path

import pytest
from clients.documents import GRPC, HTTP, examples

DOCUMENT = Path(__file__).parents[2] / "docs" / "clients.md"


def test_every_example_names_its_environment_and_the_documented_addresses() -> None:
    found = examples(DOCUMENT)
    text = DOCUMENT.read_text("utf-8")
    assert len(found) == text.count("<!-- client:") >= 9
    for each in found:
        assert each.language in ("python", "js", "sh"), each.name
        assert HTTP in each.code or GRPC in each.code, each.name
        assert bool(each.packages) is not bool(each.variable), each.name
        pins = [word.rpartition("==" if each.language != "js" else "@") for word in each.packages]
        assert all(pin[0] and pin[2] for pin in pins), f"{each.name} has packages without a version"
        assert HTTP not in each.at("127.0.0.1:1", "127.0.0.1:2")
    names = {each.name for each in found}
    proofs = {path.stem for path in (DOCUMENT.parents[1] / "tests/clients/proofs").iterdir()}
    assert proofs <= names, "a proof belongs to no example"


def test_two_examples_of_one_name_are_refused(tmp_path: Path) -> None:
    one = "<!-- client: a -->\n`pip install b==1`:\n\n```sh\necho\n```\n"
    (tmp_path / "c.md").write_text(one + one)
    with pytest.raises(ValueError, match="two examples"):
        examples(tmp_path / "c.md")
