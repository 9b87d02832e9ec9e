"""Addresses of adapters: which texts are some, and which of them a list of prefixes allows."""

from __future__ import annotations

import pytest
from loraplex.sources import AdapterAddress, AddressInvalid, AllowList

GOOD = {
    "hf://org/name": "hf://org/name",
    "huggingface://org/name": "hf://org/name",
    "HF://Org/Na.me@v1": "hf://Org/Na.me@v1",
    "hf://org/name@refs/pr/1:a/b": "hf://org/name@refs/pr/1:a/b",
    "hf://org/name:a/b/": "hf://org/name:a/b",
    "s3://bucket/a/b/": "s3://bucket/a/b",
    "s3a://bucket": "s3://bucket",
    "gs://my.bucket_1/x": "gs://my.bucket_1/x",
    "gcs://bucket/x": "gs://bucket/x",
    "file:///a/b": "file:///a/b",
    "file:////a": "file:///a",
}
BAD = [
    "", "org/name", "/a", "http://h/x", "https://h/x", "hf://name", "hf://org/", "hf://../name",
    "hf://org/name@../x", "hf://org/name@a/../b", "hf://org/name:../x", "hf://org/name:/x/../y",
    "hf://org/name?x", "hf://org/name#x", "hf://org/name/x", "hf://org/..", "hf://org/na me",
    "hf://datasets/org/name", "hf://user:pw@host/org/name", "s3://", "s3://B", "s3://b/../c",
    "s3://bucket/a/../b", "s3://bucket/a//b", "s3://bucket/./a", "s3://bucket/*", "s3://bucket/a?b",
    "s3://key:secret@bucket/a", "s3://bucket/%2e%2e/a", "s3://bucket/a\n", "gs://bucket/a\x00b",
    "file://a/b", "file:///", "file:///a/../b", "file:///a/./b", "file://localhost/a",
    "s3://bucket/" + "a" * 1100, "s3://bucket/[a]", "s3://bucket/{a,b}", "file::local://x",
    "simplecache::s3://bucket/a",
]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_an_address_has_one_form(text: str) -> None:
    assert str(AdapterAddress.parse(text)) == GOOD[text]
    assert AdapterAddress.parse(GOOD[text]) == AdapterAddress.parse(text)


@pytest.mark.parametrize("text", BAD)
def test_what_could_mean_something_else_is_no_address(text: str) -> None:
    with pytest.raises(AddressInvalid) as refused:
        AdapterAddress.parse(text)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("prefix", "text", "is_allowed"),
    [
        ("s3://bucket", "s3://bucket", True),
        ("s3://bucket", "s3://bucket/a", True),
        ("s3://bucket/", "s3://bucket/a", True),
        ("s3://bucket", "s3://bucket-of-others/a", False),
        ("s3://bucket/a", "s3://bucket/a/b", True),
        ("s3://bucket/a", "s3://bucket/ab", False),
        ("s3://bucket/a", "s3://bucket", False),
        ("s3://", "s3://any/a", True),
        ("s3://bucket", "gs://bucket/a", False),
        ("hf://org", "hf://org/name@v:x", True),
        ("hf://org", "hf://org2/name", False),
        ("hf://org/", "hf://org/name", True),
        ("hf://org/name", "hf://org/name@v1", True),
        ("hf://org/name", "hf://org/name:a", True),
        ("hf://org/name", "hf://org/name2", False),
        ("hf://org/name@v1", "hf://org/name@v1:a", True),
        ("hf://org/name@v1", "hf://org/name@v2", False),
        ("hf://org/name@v1", "hf://org/name", False),
        ("huggingface://org", "hf://org/name", True),
        ("file:///mnt/a", "file:///mnt/a/b", True),
        ("file:///mnt/a", "file:///mnt/ab", False),
    ],
)
def test_a_prefix_ends_where_a_part_ends(prefix: str, text: str, is_allowed: bool) -> None:
    assert (AdapterAddress.parse(text) in AllowList([prefix])) is is_allowed


def test_without_prefixes_nothing_is_allowed_and_bad_ones_are_refused() -> None:
    assert AdapterAddress.parse("hf://org/name") not in AllowList([])
    for prefix in ("", "org", "http://x", "s3://b/../c", "s3://key:secret@b", "hf://*"):
        with pytest.raises(AddressInvalid):
            AllowList([prefix])
