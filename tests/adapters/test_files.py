"""Adapter directories: only two regular files below the root are ever opened."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters.adapter_files import BASE, BASE_JSON, write_adapter
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from loraplex_adapters.format.examine import inspect
from loraplex_adapters.format.files import open_below, open_directory
from loraplex_model.base.refusal import Refusal

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def opened_path(root: Path, relative: str) -> Path:
    with open_below(root, relative) as opened:
        return Path(os.readlink(f"/proc/self/fd/{opened._descriptor}"))


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's address is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


IRREGULAR: dict[str, Callable[[Path], None]] = {
    "a link to a sound file": lambda p: p.symlink_to(p.with_name("elsewhere")),
    "a link to nothing": lambda p: p.symlink_to("nowhere"),
    "a link to itself": lambda p: p.symlink_to(p.name),
    "a FIFO": lambda p: os.mkfifo(p),
    "a directory": lambda p: p.mkdir(),
    "a socket": make_socket,
}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("make", IRREGULAR.values(), ids=IRREGULAR)
def test_only_regular_files_are_opened(
    make: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "a")
    (source / name).rename(source / "elsewhere")
    make(source / name)
    with pytest.raises(Refusal) as refused:
        inspect(source, BASE)
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_INVALID", name)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a device needs root")
def test_a_device_is_not_opened(tmp_path: Path) -> None:
    source = write_adapter(tmp_path)
    (source / WEIGHTS).unlink()
    try:
        os.mknod(source / WEIGHTS, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("devices cannot be made here")
    with pytest.raises(Refusal, match="regular"):
        inspect(source, BASE)


@pytest.mark.parametrize("make", [IRREGULAR["a link to a sound file"], IRREGULAR["a FIFO"]])
def test_a_file_swapped_between_the_look_and_the_open_is_refused(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_adapter(tmp_path)
    look = os.lstat

    def look_then_swap(name: str, *, dir_fd: int) -> os.stat_result:
        seen = look(name, dir_fd=dir_fd)
        (source / name).rename(source / "elsewhere")
        make(source / name)
        return seen

    with open_directory(source) as directory:
        monkeypatch.setattr("loraplex_adapters.format.files.os.lstat", look_then_swap)
        with pytest.raises(Refusal) as refused:
            directory.read_config()
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_INVALID", CONFIG)


def test_a_file_that_shrinks_while_it_is_read_is_a_typed_error(tmp_path: Path) -> None:
    source = write_adapter(tmp_path)
    with open_directory(source) as directory, directory.open_weights(1 << 30) as weights:
        os.truncate(source / WEIGHTS, 100)
        with pytest.raises(Refusal, match="shorter"):
            weights.read(0, weights.size)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    (write_adapter(tmp_path) / name).unlink()
    with pytest.raises(Refusal) as refused:
        inspect(tmp_path, BASE)
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_INVALID", name)


@pytest.mark.parametrize(
    "pickle", ["adapter_model.bin", "pytorch_model.pt", "x.pkl", "x.ckpt", "x.pth", "x.pickle"]
)
def test_pickled_weights_are_refused_with_the_way_out(pickle: str, tmp_path: Path) -> None:
    source = write_adapter(tmp_path)
    (source / WEIGHTS).rename(source / pickle)
    with pytest.raises(Refusal, match="safe_serialization") as refused:
        inspect(source, BASE)
    assert (refused.value.reason, refused.value.field) == ("ADAPTER_UNSUPPORTED", pickle)


OPENED = """
import os, sys
from pathlib import Path
import msgspec
from loraplex_adapters.format.examine import inspect
from loraplex_model.base.info import BaseInfo
base = msgspec.json.decode(sys.argv[2], type=BaseInfo)
names = []
sys.addaudithook(lambda event, args: names.append(str(args[0])) if event == "open" else None)
inspect(Path(sys.argv[1]), base)
print("\\n".join(names))
"""


def test_what_lies_beside_the_two_files_is_never_opened(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "a")
    flag = tmp_path / "flag"
    trap = f"import pathlib; pathlib.Path({str(flag)!r}).touch()"
    for name in ("adapter_model.bin", "conftest.py", "modeling.py", "sitecustomize.py"):
        (source / name).write_text(trap)
    template = "{{ cycler.__init__.__globals__.os.mknod('" + str(flag) + "') }}"
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    ran = subprocess.run(
        [sys.executable, "-c", OPENED, str(source), BASE_JSON],
        check=True,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.split() == [str(source), CONFIG, WEIGHTS]
    assert not flag.exists()


ESCAPES = [
    "",
    "/",
    ".",
    "..",
    "/etc",
    "//etc",
    "a/../..",
    "a/..",
    "./a",
    "a//b",
    "a/./b",
    "a\0b",
    "\0",
    "a/",
    "../root2/a",
    "link",
    "link/a",
    "inner-link/b",
    "file",
    "missing",
    "a" * 300,
    "a/" * 3000 + "a",
    "%2e%2e/etc",
    "\uff0e\uff0e/etc",
    "..\\etc",
    "C:\\Windows",
    "CON",
    "~root",
    "\ud800",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An import root with `a` and `a/b`, with links out of it and within it, and a sibling."""
    top = tmp_path_factory.mktemp("top")
    made = top / "root"
    write_adapter(made / "a" / "b")
    write_adapter(top / "root2" / "a")
    (made / "file").write_text("x")
    (made / "link").symlink_to(top / "root2")
    (made / "inner-link").symlink_to("a")
    return made


@pytest.mark.parametrize("relative", ESCAPES)
def test_a_path_stays_below_the_root_in_plain_form(relative: str, root: Path) -> None:
    if relative == "a/":
        assert opened_path(root, relative) == root.resolve() / "a"
        return
    with pytest.raises(Refusal) as refused:
        open_below(root, relative)
    assert (refused.value.reason, refused.value.field) == ("FIELD_INVALID", "path")
    assert str(root) not in refused.value.message


PIECES = st.sampled_from(["a", "b", "..", ".", "", "/", "link", "inner-link", "file", "\0", "a/b"])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=12) | st.lists(PIECES, max_size=6).map("/".join))
@example("a/b")
@example("inner-link/b")
def test_whatever_the_path_only_real_directories_below_the_root_open(
    root: Path, relative: str
) -> None:
    try:
        with open_below(root, relative) as directory:
            found = directory
    except Refusal as error:
        assert error.reason == "FIELD_INVALID"  # noqa: PT017
        return
    assert found is not None
    assert relative.removesuffix("/") in ("a", "a/b")
    assert opened_path(root, relative).is_relative_to(root.resolve())


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "imports").symlink_to(root)
    with open_below(tmp_path / "imports", "a/b") as source:
        assert inspect(source, BASE).rank == 4


def test_a_missing_root_is_the_servers_fault(tmp_path: Path) -> None:
    with pytest.raises(Refusal) as refused:
        open_below(tmp_path / "none", "a")
    assert refused.value.reason == "STORE_UNAVAILABLE"


def test_descriptors_are_given_back(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for relative in (*ESCAPES, "a", "a/b"):
        try:
            with open_below(root, relative) as source:
                inspect(source, BASE)
        except Refusal:
            pass
    assert len(os.listdir("/proc/self/fd")) == before
