"""Data files are taken as people have them, or refused once with what they are."""

from __future__ import annotations

import codecs
import contextlib
import csv
import datetime
import decimal
import gzip
import hashlib
import io
import json
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loraplex_model.base.refusal import Refusal
from loraplex_training.data import records
from loraplex_training.data.prepare import RowNames
from loraplex_training.data.problems import Problems
from loraplex_training.data.records import RecordFile
from loraplex_training.data.shapes import DataRecord

ROWS = [{"prompt": f"what is {i}?", "completion": f"the {i}"} for i in range(5)]
MARK = codecs.BOM_UTF8
TALK = {"messages": [{"role": "user", "content": 'a,\n"b"'}, {"role": "assistant", "content": "c"}]}


def opened(path: Path, content: bytes | None = None) -> tuple[RecordFile, list[DataRecord]]:
    """Raises Refusal with everything that is wrong."""
    if content is not None:
        path.write_bytes(content)
    problems = Problems(strict=True)
    file = RecordFile(path, problems)
    found = list(file)
    problems.check()
    return file, found


def refused(path: Path, content: bytes | None = None) -> str:
    """Returns the only problem of a file."""
    with pytest.raises(Refusal) as caught:
        opened(path, content)
    assert caught.value.reason == "DATA_INVALID"
    [message] = caught.value.messages
    assert message.startswith(str(path))
    assert message.isprintable()
    return message.removeprefix(str(path))


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def asked(found: list[DataRecord]) -> list[str]:
    return [record.messages[0]["content"] for record in found]


def table(rows: list[dict[str, str]], **options: Any) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


READ: list[tuple[str, str, Callable[[], bytes]]] = [
    ("a.jsonl", "JSONL", lambda: lines(ROWS)),
    ("a.json", "JSON array", lambda: json.dumps(ROWS).encode()),
    ("a.json", "JSON array", lambda: json.dumps(ROWS, indent=2).encode() + b"\n\n"),
    ("a.json", "JSON array", lambda: MARK + b" [" + b",\r\n".join(map(enc, ROWS)) + b"]"),
    ("a.json", "JSON objects", lambda: b"\n".join(json.dumps(r, indent=1).encode() for r in ROWS)),
    ("a.json", "JSON objects", lambda: b"".join(map(enc, ROWS))),
    ("a.json", "JSON objects", lambda: b"\r".join(map(enc, ROWS))),
    ("a.csv", "CSV", lambda: table(ROWS, lineterminator="\r")),
    ("a.csv", "CSV", lambda: table(ROWS)),
    ("a.CSV", "CSV", lambda: MARK + table(ROWS, lineterminator="\n")),
    ("a.csv", "CSV", lambda: table(ROWS, quoting=csv.QUOTE_ALL)),
    ("a.csv", "CSV", lambda: table(ROWS, delimiter=";")),
    ("data.jsonl", "CSV", lambda: table(ROWS)),
    ("a.tsv", "TSV", lambda: table(ROWS, delimiter="\t")),
    ("data.jsonl", "TSV", lambda: table(ROWS, delimiter="\t")),
]  # fmt: skip


def enc(row: Any) -> bytes:
    return json.dumps(row).encode()


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize(("name", "kind", "content"), READ)
def test_the_same_examples_are_read_of_every_kind(
    tmp_path: Path, name: str, kind: str, content: Callable[[], bytes], gzipped: bool
) -> None:
    data = gzip.compress(content()) if gzipped else content()
    path = tmp_path / (name + ".gz" * gzipped)
    file, found = opened(path, data)
    assert asked(found) == [row["prompt"] for row in ROWS]
    assert [record.messages[1]["content"] for record in found] == [r["completion"] for r in ROWS]
    assert file.kind == kind + ", gzipped" * gzipped
    assert (file.rows, file.blank) == (5, 0)
    assert file.digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_of_one_example_is_no_list_of_examples(tmp_path: Path, indent: int | None) -> None:
    tools = {"tags": [{"a": 1}, {"b": 2}], "_list": [1, 2]}
    for row in (TALK | tools, {"prompt": "a", "completion": "b"} | tools):
        _, [found] = opened(tmp_path / "a.json", json.dumps(row, indent=indent).encode())
        assert found.shape in row


def test_line_separators_of_unicode_are_no_ends_of_lines(tmp_path: Path) -> None:
    text = "a\u2028b\x85c\u2029d"
    content = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
    for name in ("a.jsonl", "b.csv"):
        if name == "b.csv":
            content = f"prompt,completion\n{text},b\n".encode()
        _, [found] = opened(tmp_path / name, content)
        assert text in (found.text, *(m["content"] for m in found.messages))


def test_two_bad_lines_at_the_start_are_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(Refusal) as caught:
        opened(path, b'{"text": "a\n{"text": oh}\n' + lines(ROWS))
    assert [message.split(": ")[0] for message in caught.value.messages] == [
        f"{path}:1",
        f"{path}:2",
    ]


def test_an_element_or_a_row_at_fault_is_named_by_its_number(tmp_path: Path) -> None:
    rows = [*ROWS[:2], {"prompt": "a"}]
    assert refused(tmp_path / "a.json", json.dumps(rows).encode()) == ':3: has no "completion"'
    text = table(
        [ROWS[0], {"prompt": "a\nb", "completion": "c"}, {"prompt": "d", "completion": ""}]
    )
    assert refused(tmp_path / "a.csv", text).startswith(':4: has no "completion"; an empty cell')


def test_cells_with_quotes_delimiters_and_line_breaks_are_as_they_were_written(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": 'say "hi",\r\nthen\tgo; ', "completion": "日本\n\n"}, ROWS[0]]
    for delimiter, name in ((",", "a.csv"), (";", "b.csv"), ("\t", "c.tsv")):
        _, found = opened(tmp_path / name, table(rows, delimiter=delimiter))
        assert [m["content"] for m in found[0].messages] == list(rows[0].values())


def test_empty_cells_are_absent_and_empty_rows_blank(tmp_path: Path) -> None:
    content = b"\nprompt,completion,text,instruction,output\na,b,,,\n,,c,,\n\n,,,,\n,,,d,e\n"
    file, found = opened(tmp_path / "a.csv", content)
    assert [record.shape for record in found] == ["prompt", "text", "instruction"]
    assert (file.rows, file.blank) == (3, 2)


def test_a_cell_of_messages_holds_json(tmp_path: Path) -> None:
    row = {"messages": json.dumps(TALK["messages"])}
    _, found = opened(tmp_path / "a.csv", table([row]))
    assert list(found[0].messages) == TALK["messages"]
    problems = Problems()
    path = tmp_path / "b.csv"
    talk = [{"role": "Human", "content": "a"}, {"role": "assistant", "content": "b", "name": None}]
    path.write_bytes(table([{"talk": json.dumps(talk)}]))
    names = RowNames({"messages": "talk"}, {"Human": "user"})
    [found] = RecordFile(path, problems, names=names)
    problems.check()
    assert [m["role"] for m in found.messages] == ["user", "assistant"]
    row = {"messages": str(TALK["messages"])}
    assert 'has a cell of the column "messages" that is not JSON' in refused(
        tmp_path / "a.csv", table([row])
    )


def test_the_index_that_pandas_writes_is_ignored(tmp_path: Path) -> None:
    for name in ("", "Unnamed: 0"):
        file, found = opened(tmp_path / "a.csv", f"{name},prompt,completion\n0,a,b\n".encode())
        assert asked(found) == ["a"]
        assert sum(file.ignored.values()) == 1


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, "x")
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    return out.getvalue()


FOREIGN: list[tuple[str, bytes, str, str]] = [
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(40), "Zstandard", "zstd -d"),
    ("a.jsonl.xz", b"\xfd7zXZ\0" + bytes(40), "xz", "xz -dk"),
    ("a.jsonl.bz2", b"BZh91AY&SY", "bzip2", "bunzip2"),
    ("a.jsonl.gz", gzip.compress(gzip.compress(lines(ROWS))), "gzip twice", "gunzip"),
    ("a.zip", zipped("a.jsonl"), "ZIP archive", "unzip"),
    ("a.xlsx", zipped("[Content_Types].xml"), "Excel", "CSV"),
    ("a.tar", tarred(), "tar archive", "tar -xf"),
    ("a.tar.gz", gzip.compress(tarred()), "tar archive", "tar -xf"),
    ("a.db", b"SQLite format 3\0" + bytes(100), "SQLite", "to_json"),
    ("a.arrow", b"ARROW1\0\0" + bytes(100), "Arrow", "to_parquet"),
    ("a.arrow", b"\xff\xff\xff\xff" + bytes(100), "Arrow", "to_parquet"),
    ("a.feather", b"FEA1" + bytes(100), "Feather", "to_json"),
    ("a.pkl", pickle.dumps(ROWS), "pickle", "to_json"),
    ("a.npy", b"\x93NUMPY\x01\0" + bytes(100), "NumPy", "JSON lines"),
    (
        "a.safetensors",
        (200).to_bytes(8, "little") + b'{"a": 1}' + b" " * 40,
        "safetensors",
        "weights",
    ),
    ("a.gguf", b"GGUF\x03\0\0\0" + bytes(40), "GGUF", "--model"),
    ("a.pdf", b"%PDF-1.7\n\xff\xff", "PDF", "JSON lines"),
    (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "LFS",
        "git lfs pull",
    ),
    ("a.bin", bytes(range(256)), "binary data", "JSON lines"),
    ("a.jsonl", lines(ROWS).decode().encode("utf-16"), "UTF-16", "iconv"),
    ("a.jsonl", lines(ROWS).decode().encode("utf-16-le"), "UTF-16", "iconv"),
    ("a.csv", table(ROWS).decode().encode("utf-16-be"), "UTF-16", "iconv"),
    ("a.jsonl", lines(ROWS).decode().encode("utf-32"), "UTF-32", "iconv"),
    ("a.csv", "prompt,completion\na,é\nb,è\n".encode("latin-1"), "not UTF-8", "iconv"),
    (
        "a.json",
        json.dumps([{"text": "é"}], ensure_ascii=False).encode("latin-1"),
        "not UTF-8",
        "iconv",
    ),
    ("a.html", b"<!DOCTYPE html>\n<html>\n<body>Sign in</body></html>\n", "HTML", "download"),
    ("a.xml", b'<?xml version="1.0"?>\n<rows>\n<row/></rows>\n', "XML", '{"text"'),
    ("a.yaml", b"- prompt: a\n  completion: b\n- prompt: c\n", "YAML", '{"text"'),
    ("a.txt", b"Once upon a time\nthere was a line.\n" * 50, "text", '"Once upon a time"'),
    ("a.jsonl", b'"a"\n"b"\n' * 50, "text, not JSON lines", '{"text"'),
    ("a.jsonl", b"".join(str(r).encode() + b"\n" for r in ROWS), "Python", "json.dumps"),
    ("a.jsonl", lines(ROWS).replace(b"}\n", b"},\n"), "comma", "sed"),
    ("a.json", json.dumps({"data": ROWS}).encode(), '"data"', "jq"),
    ("a.json", json.dumps({"version": "1", "train": ROWS}, indent=1).encode(), '"train"', "jq"),
    (
        "a.json",
        json.dumps({"rows": [{"row_idx": 0, "row": ROWS[0]}] * 60_000}).encode(),
        '"rows"',
        "jq",
    ),
    (
        "a.json",
        json.dumps({"prompt": {"0": "a"}, "completion": {"0": "b"}}).encode(),
        "columns",
        "to_json",
    ),
    (
        "a.json",
        json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}).encode(),
        "columns",
        "to_json",
    ),
    ("a.json", json.dumps(["a", "b"] * 50).encode(), "not of objects", "each element"),
    ("a.json", json.dumps([[ROWS[0]]] * 50).encode(), "not of objects", "each element"),
    ("a.json", b"[]", "empty JSON list", "examples"),
    ("a.json", json.dumps(ROWS, indent=1).encode()[:-20], "cannot be read", "example 5"),
    ("a.json", json.dumps(ROWS).encode()[:-1], "cut off", "example 5"),
    ("a.json", json.dumps(ROWS).encode()[:-1] + b",]", "example 6", "not JSON"),
    ("a.json", json.dumps(ROWS).replace("}, {", "} {").encode(), "after example 1", "comma"),
    ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]\n', "goes on after", "each line"),
    ("a.json", b'[{"text": "a", "text": "b"}]', "example 1", "the key text twice"),
    ("a.json", b'{\n "text": "a"\n},\n{\n "text": "b"\n}\n', "commas", "[ and ]"),
    ("a.json", b'{\n "text": "a"\n}\n{\n "text": oh\n}\n', "example 2", "not JSON"),
    ("a.jsonl.gz", gzip.compress(lines(ROWS * 99))[:-30], "damaged gzip", "copy it again"),
    ("a.jsonl.gz", gzip.compress(lines(ROWS))[:20] + bytes(99), "damaged gzip", "copy it again"),
    ("a.csv", b'prompt,completion\na,"b\nc,d\n', "damaged CSV", "quotes"),
    ("a.csv", b'prompt,completion\na,"b" c\nc,d\n', "damaged CSV at line 2", "quotes"),
    ("a.csv", b"prompt,prompt\na,b\n", "two columns", '"prompt"'),
    ("a.csv", b"prompt,completion\n", "is empty", "example"),
    ("a.csv", b"a,b\n" * 200, '"a", "b"', "--columns"),
    (
        "a.jsonl",
        lines([{"question_text": "a", "reply": "b"}] * 200),
        '"question_text", "reply"',
        "--columns",
    ),
]


@pytest.mark.parametrize(("name", "content", "what", "way_out"), FOREIGN)
def test_what_is_not_read_is_named_once_with_the_way_out(
    tmp_path: Path, name: str, content: bytes, what: str, way_out: str
) -> None:
    message = refused(tmp_path / name, content)
    assert what in message
    assert way_out in message


def test_a_latin_1_file_is_named_at_its_first_and_its_last_such_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = "".join(f'{{"text": "caf{"é" if i % 2 else "e"}"}}\n' for i in range(400))
    with pytest.raises(Refusal) as caught:
        opened(path, rows.encode("latin-1"))
    first, last = caught.value.messages
    assert first.startswith(f"{path}:2: is not UTF-8")
    assert "iconv" in first
    assert last == f"{path}:400: is the last of 200 lines that are not UTF-8"


def test_directories_are_named_with_what_to_do(tmp_path: Path) -> None:
    assert "has none" in refused(tmp_path)
    (tmp_path / "train-00000.parquet").touch()
    assert f"--data {tmp_path / 'train-00000.parquet'}" in refused(tmp_path)
    (tmp_path / "dataset_info.json").touch()
    assert "load_from_disk" in refused(tmp_path)


def test_decompressed_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.gz"
    monkeypatch.setattr(records, "MAX_FILE", 1 << 20)
    content = gzip.compress(lines(ROWS) + b" " * (200 << 20))
    assert len(content) < 1 << 20
    taken = 0
    read = gzip.GzipFile.read1

    def counted(self: gzip.GzipFile, size: int = -1) -> bytes:
        nonlocal taken
        data = read(self, size)
        taken += len(data)
        return data

    monkeypatch.setattr(gzip.GzipFile, "read1", counted)
    assert "has more than 1,048,576 bytes when decompressed" in refused(path, content)
    assert taken < 4 << 20


def test_the_rows_of_every_kind_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE", 200)
    long = {"prompt": "a" * 190, "completion": "b"}
    array = json.dumps([ROWS[0], long, ROWS[1]]).encode()
    assert refused(tmp_path / "a.json", array) == ":2: is longer than 200 characters"
    very = json.dumps([ROWS[0], long | {"prompt": "a" * 5000}]).encode()
    assert "example 2" in (message := refused(tmp_path / "a.json", very))
    assert "longer than 200" in message
    rows = {"prompt": "a\n" * 90, "completion": "b\n" * 90}
    assert refused(tmp_path / "a.csv", table([ROWS[0], rows])).startswith(":3: is longer than 200")
    assert "line (2) of more than 200" in refused(
        tmp_path / "a.csv", table([long | {"prompt": "a" * 300}])
    )
    field = {"prompt": "a\n" * 150, "completion": "b"}
    before = csv.field_size_limit()
    assert "field larger than field limit" in refused(tmp_path / "a.csv", table([field]))
    assert csv.field_size_limit() == before


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(["a.jsonl", "a.csv", "a.tsv", "a.json"]),
    st.sampled_from([b"", b"[", b"{", b"prompt,completion\n", b"\xef\xbb\xbf", b'{"data": [']),
    st.binary(max_size=120)
    | st.text("[]{}\",:'ab\n\t; é0\\", max_size=120).map(str.encode)
    | st.lists(st.sampled_from([b'{"text": "a"}', b"[", b"]", b",", b"\n"])).map(b"".join),
    st.booleans(),
)
def test_no_bytes_do_worse_than_be_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, start: bytes, rest: bytes, gzipped: bool
) -> None:
    content = gzip.compress(start + rest) if gzipped else start + rest
    with contextlib.suppress(Refusal):
        opened(tmp_path_factory.getbasetemp() / name, content)


def test_a_table_may_have_very_many_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    names = ",".join(f"_{i}" for i in range(50_000))
    path.write_text(f"{names},q,a\n{',' * 50_000}b,c\n")
    problems = Problems()
    file = RecordFile(path, problems, names=RowNames({"prompt": "q", "completion": "a"}))
    assert asked(list(file)) == ["b"]
    assert "a" in file.keys
    assert len(file.keys) < 50_000


def test_many_elements_are_read_in_linear_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_LINE", 1000)  # so that the window moves often
    rows = [{"prompt": f"{i}", "completion": "é" * (i % 50 + 1)} for i in range(20_000)]
    for content in (json.dumps(rows), "\n\n".join(json.dumps(r, indent=1) for r in rows)):
        _, found = opened(tmp_path / "a.json", content.encode())
        assert asked(found) == [row["prompt"] for row in rows]


def test_without_pyarrow_a_parquet_file_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = refused(tmp_path / "a.parquet", b"PAR1" + bytes(range(256)) + b"PAR1")
    assert "is a Parquet file" in message
    assert "pip install 'loraplex[data]'" in message


class TestParquet:
    """Needs pyarrow, the extra `data`."""

    @pytest.fixture(autouse=True)
    def pyarrow(self) -> Any:
        self.arrow = pytest.importorskip("pyarrow")
        self.parquet = pytest.importorskip("pyarrow.parquet")

    def write(self, path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
        self.parquet.write_table(self.arrow.Table.from_pylist(rows), path, **options)
        return path

    @pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
    def test_rows_are_read(self, tmp_path: Path, compression: str) -> None:
        path = self.write(tmp_path / "a.parquet", ROWS * 700, compression=compression)
        file, found = opened(path)
        assert asked(found) == [row["prompt"] for row in ROWS] * 700
        assert [record.line for record in found] == list(range(1, 3501))
        assert file.kind == "Parquet"
        assert file.digest == hashlib.sha256(path.read_bytes()).hexdigest()
        zipped = tmp_path / "data.jsonl"
        assert len(opened(zipped, gzip.compress(path.read_bytes()))[1]) == 3500

    def test_conversations_are_lists_and_the_nulls_of_their_structs_are_absent(
        self, tmp_path: Path
    ) -> None:
        # Arrow gives every message the keys of all messages, null where they were absent.
        rows = [
            TALK,
            {"messages": [{"role": "user", "content": "a", "name": None}, TALK["messages"][1]]},
        ]
        rows = [row | {"prompt": None, "completion": None} for row in rows]
        rows.append({"messages": None, "prompt": "a", "completion": "b"})
        path = self.write(tmp_path / "a.parquet", rows)
        _, found = opened(path)
        assert list(found[0].messages) == TALK["messages"]
        assert [record.shape for record in found] == ["messages", "messages", "prompt"]

    def test_a_column_of_json_text_is_parsed(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.parquet", [{"messages": json.dumps(TALK["messages"])}])
        _, [found] = opened(path)
        assert list(found.messages) == TALK["messages"]

    def test_a_null_answer_is_refused_by_its_row(self, tmp_path: Path) -> None:
        rows = [*ROWS, {"prompt": "a", "completion": None}]
        message = refused(self.write(tmp_path / "a.parquet", rows))
        assert message.startswith(':6: has no "completion"; an empty cell counts as absent')

    def test_a_damaged_file_is_named_once(self, tmp_path: Path) -> None:
        whole = self.write(tmp_path / "a.parquet", ROWS * 99).read_bytes()
        for content in (whole[:-50], b"PAR1" + bytes(range(256)) + b"PAR1", whole[:50] + bytes(99)):
            assert "is a damaged Parquet file" in refused(tmp_path / "b.parquet", content)

    def test_its_size_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.write(
            tmp_path / "a.parquet", [{"text": "a" * 50_000}] * 90, use_dictionary=False
        )
        assert path.stat().st_size < 1 << 20
        monkeypatch.setattr(records, "MAX_FILE", 1 << 20)
        assert "bytes when decompressed; at most 1,048,576" in refused(path)
        # One value, repeated by a dictionary, of which every row is a copy.
        self.write(path, [{"text": "a" * 50_000}] * 9000)
        monkeypatch.setattr(records, "MAX_LINE", 1000)
        assert "has rows of more than 1,000 bytes" in refused(path)

    def test_a_value_counts_as_often_as_it_is_repeated(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The file states the size of the dictionary, not of what it stands for.
        path = self.write(tmp_path / "a.parquet", [{"text": "a" * 50_000}] * 90)
        monkeypatch.setattr(records, "MAX_FILE", 1 << 20)
        assert "when decompressed up to row 21; at most 1,048,576" in refused(path)
        monkeypatch.setattr(records, "MAX_LINE", 49_000)
        # One long row among short ones.
        self.write(path, [{"text": "b"}] * 5 + [{"text": "a" * 50_000}])
        assert refused(path) == ":6: is longer than 49,000 characters"

    def test_values_that_json_does_not_have_are_named(self, tmp_path: Path) -> None:
        day = datetime.date(2024, 5, 6)
        for value, kind in ((b"a", "bytes"), (day, "date"), (decimal.Decimal(1), "Decimal")):
            path = self.write(tmp_path / "a.parquet", [{"prompt": value, "completion": "b"}])
            assert refused(path) == f":1: prompt is a value of the type {kind}, not a string"
        notes = {"id": day, "meta": b"\xff", "prompt": "a", "completion": "b"}
        assert len(opened(self.write(tmp_path / "a.parquet", [notes]))[1]) == 1
