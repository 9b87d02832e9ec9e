"""What the server holds in memory and writes to the disk is not for other users of the machine."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest
from adapters.adapter_files import BASE
from loraplex.v1 import adapter_pb2, adapter_pb2_grpc, training_pb2, training_pb2_grpc
from loraplex_adapters.store import Store
from loraplex_model.base.process.core_dumps import allowed
from loraplex_server.runtime import privacy
from rpc.harness import config_for, write_adapter
from server.test_process import TESTS, children, serving

from adapters import stores

ANSWER = "import sys; sys.path.insert(0, {tests!r}); from server.dumpable import is_dumpable"
FORBID = "from loraplex_model.base.process.core_dumps import forbid_core_dumps"


def python(code: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def unlimited() -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


def core_limits(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("Max core file size")]
    return line.split()[4:6]


# core dumps


def test_forbidden_a_process_can_neither_be_dumped_nor_allowed_again() -> None:
    before = ANSWER.format(tests=str(TESTS))
    code = f"{before}; {FORBID}; print(is_dumpable()); forbid_core_dumps(); print(is_dumpable())"
    process = python(code, preexec_fn=unlimited)
    assert process.communicate()[0].split() == ["True", "False"]


def test_a_process_that_aborts_leaves_no_image(tmp_path: Path) -> None:
    def dumps(code: str) -> bool:
        process = python(code, cwd=tmp_path, preexec_fn=unlimited)
        return os.WCOREDUMP(os.waitpid(process.pid, 0)[1])

    if not dumps("import os; os.abort()"):
        pytest.skip("this system writes no core dumps here")
    assert not dumps(f"import os; {FORBID}; forbid_core_dumps(); os.abort()")


NOBODY = 65534

AS_NOBODY = f"""
import ctypes, os
{FORBID}
os.setgid({NOBODY})
os.setuid({NOBODY})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # a change of the user forbids it as well
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="changes to another user")
def test_others_of_the_same_user_read_its_state_but_not_its_memory() -> None:
    def readable(forbidding: str) -> set[str]:
        code = f"{AS_NOBODY}\n{forbidding}\nprint('ready', flush=True)\ninput()"
        process = python(code, stdin=subprocess.PIPE)
        assert process.stdout.readline() == "ready\n"
        names = ("status", "statm", "stat", "limits", "cmdline", "environ", "smaps", "auxv")
        found = set()
        for name in names:
            command = ["cat", f"/proc/{process.pid}/{name}"]
            user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            if subprocess.run(command, **user, capture_output=True, check=False).returncode == 0:
                found.add(name)
        process.communicate("\n")
        return found

    # What monitors and our own tests read of another process.
    state = {"status", "statm", "stat", "limits", "cmdline"}
    assert readable("") == state | {"environ", "smaps", "auxv"}
    assert readable("forbid_core_dumps()") == state


@pytest.mark.parametrize("core_dumps", [False, True])
def test_server_and_engine_write_core_dumps_only_if_the_setting_allows_it(
    tmp_path: Path, core_dumps: bool
) -> None:
    note = tmp_path / "note"
    options = {"engine_factory": "server.dumpable:build", "core_dumps": core_dumps}
    config = config_for(tmp_path, engine_options={"note": str(note)}, **options)
    assert config.engine_setup().core_dumps is core_dumps
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    as_before = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
    with serving(tmp_path, engine_options={"note": str(note)}, **options) as up:
        engine, *_ = children(up.process.pid)
        assert note.read_text() == str(core_dumps)
        for pid in (up.process.pid, engine):
            assert core_limits(pid)[1] == (as_before if core_dumps else "0")


@pytest.mark.parametrize("core_dumps", [False, True])
def test_the_trainer_is_told_and_obeys(tmp_path: Path, core_dumps: bool) -> None:
    variables = config_for(tmp_path, core_dumps=core_dumps).trainer_environment({})
    assert allowed(variables) is core_dumps
    code = (
        f"{ANSWER.format(tests=str(TESTS))}; import loraplex_training.cli as cli; "
        "cli.app = lambda: print(is_dumpable()); cli.main()"
    )
    process = python(code, env={**os.environ, **variables})
    assert process.communicate()[0].split() == [str(core_dumps)]


@pytest.mark.parametrize("text", ["", "0", "false", "no", "off", "perhaps"])
def test_core_dumps_are_forbidden_unless_the_variable_says_yes(text: str) -> None:
    assert not allowed({"LORAPLEX_CORE_DUMPS": text})
    assert not allowed({})
    assert allowed({"LORAPLEX_CORE_DUMPS": " True "})


# files


@pytest.fixture
def open_mask() -> Any:
    before = os.umask(0o000)
    yield
    os.umask(before)


def open_to(root: Path, bits: int) -> list[str]:
    """What below `root`, itself included, has one of these permissions; links do not count."""
    return sorted(
        str(path)
        for path in [root, *root.rglob("*")]
        if not path.is_symlink() and path.lstat().st_mode & bits
    )


def test_what_a_server_creates_is_its_users_alone(tmp_path: Path, open_mask: None) -> None:
    write_adapter(tmp_path / "import" / "a")
    settings = {
        "cache": tmp_path / "made" / "cache",
        "training": True,
        "training_jobs_dir": tmp_path / "made" / "training",
        "store": tmp_path / "made" / "store",
        "trainer": [sys.executable, "-c", "import sys; sys.exit(1)"],
    }
    with serving(tmp_path, **settings) as up, grpc.insecure_channel(up.grpc) as channel:
        adapters = adapter_pb2_grpc.AdapterServiceStub(channel)
        adapters.RegisterAdapter(adapter_pb2.RegisterAdapterRequest(name="a", path="a"))
        upload = adapters.StartUpload(adapter_pb2.StartUploadRequest()).upload_id
        header = adapter_pb2.UploadHeader(
            upload_id=upload, config_size=2, weights_size=2, expected_digest="sha256:" + "0" * 64
        )
        chunk = adapter_pb2.UploadChunk(file=adapter_pb2.ADAPTER_FILE_CONFIG, offset=0, data=b"{}")
        sent = [
            adapter_pb2.UploadAdapterRequest(header=header),
            adapter_pb2.UploadAdapterRequest(chunk=chunk),
        ]
        with pytest.raises(grpc.RpcError):
            adapters.UploadAdapter(iter(sent))
        training = training_pb2_grpc.TrainingServiceStub(channel)
        with pytest.raises(grpc.RpcError):
            training.CreateJob(
                training_pb2.CreateJobRequest(
                    spec={"name": "t"}, data={"jsonl": b'{"text": "x"}\n'}
                )
            )
    files = [path for path in (tmp_path / "made").rglob("*") if path.is_file()]
    assert {"index.sqlite3", "adapter_model.safetensors"} <= {path.name for path in files}
    assert any("uploads" in path.parts for path in files)
    assert open_to(tmp_path / "made", stat.S_IRWXG | stat.S_IRWXO) == []


def test_existing_directories_keep_their_permissions(tmp_path: Path, open_mask: None) -> None:
    store = tmp_path / "store"
    store.mkdir(0o755)
    with serving(tmp_path, store=store) as up:
        assert stat.S_IMODE(store.stat().st_mode) == 0o755
        assert open_to(store, stat.S_IRWXG | stat.S_IRWXO) == [str(store)]
        up.process.terminate()
        up.wait()
    warnings = [line for line in up.log if "other users of this machine" in line]
    assert len(warnings) == 1
    assert f"{store}: " in warnings[0]


def test_a_store_that_is_shared_with_a_group_stays_so(tmp_path: Path, open_mask: None) -> None:
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(0o2770)
    with serving(tmp_path, store=store) as up:
        inner = [path for path in store.iterdir() if path.is_dir()]
        assert inner
        assert all(path.stat().st_mode & stat.S_IRWXG == stat.S_IRWXG for path in inner)
        assert open_to(store, stat.S_IRWXO) == []
        up.process.terminate()
        up.wait()
    assert not any("other users" in line for line in up.log)


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_a_store_that_a_command_creates_is_its_users_alone(
    tmp_path: Path, open_mask: None, mask: int
) -> None:
    os.umask(mask)
    (source,) = stores.adapters(tmp_path, 1)
    with Store(tmp_path / "store") as store:
        store.register("a", source, BASE)
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("store", "training", "cache", "named"),
    [
        (0o700, 0o700, 0o755, []),
        (0o750, 0o770, 0o775, []),
        (0o701, 0o700, 0o700, ["store"]),
        (0o704, 0o702, 0o700, ["store", "training"]),
        (0o700, 0o700, 0o777, ["cache"]),
    ],
)
def test_directories_that_others_may_use_are_named(
    tmp_path: Path, store: int, training: int, cache: int, named: list[str]
) -> None:
    for name, mode in (("store", store), ("training", training), ("cache", cache)):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(mode)
    config = config_for(
        tmp_path,
        training=True,
        training_jobs_dir=tmp_path / "training",
        cache=tmp_path / "cache",
    )
    found = list(privacy.exposures(config))
    assert [name for name in ("store", "training", "cache")
            if any(line.startswith(f"{tmp_path / name}: ") for line in found)] == named  # fmt: skip
    assert len(found) == len(named)


def test_directories_that_do_not_exist_yet_are_not_named(tmp_path: Path) -> None:
    assert list(privacy.exposures(config_for(tmp_path, cache=tmp_path / "cache"))) == []
