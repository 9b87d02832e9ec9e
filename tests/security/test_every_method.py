"""Every method, called with every kind of credential: exactly those with the right role get in.

The table of roles says what must happen, the server's reflection and the protos say which methods
there are, and a server process with files of principals and keys is asked. `make test-security`
runs this module and prints the numbers.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loraplex_server.access.identity.key_file import KeyFile
from loraplex_server.access.roles import METHOD_ROLES, OPEN_METHODS, Role, is_managing
from rpc.certificates import Authority
from server.test_process import PATH, write_config

PROTOS = Path(__file__).resolve().parents[2] / "proto" / "loraplex" / "v1"
OK = "passed the check"
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED.name
DENIED = grpc.StatusCode.PERMISSION_DENIED.name

ROLES = {**{role.value: {role} for role in Role}, "none": set(), "all": set(Role)}
"""Principals of the test by name: one for each role, one without any, one with all."""

AT_ONCE = 8
"""Calls at the same time; reflection admits few."""

ADMITTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAVAILABLE,
}
"""Codes of empty requests whose caller got in: they come from the handlers."""


@dataclass(frozen=True, slots=True)
class Credential:
    """What a caller shows, and the roles that it has with it; None if it is nobody.

    `certificate` are the names in its certificate, on a server that asks for one.
    """

    name: str
    metadata: tuple[tuple[str, str], ...]
    roles: frozenset[Role] | None = None
    certificate: tuple[str, ...] = ()


@dataclass
class Outcomes:
    """What happened, by method and credential, and what should have."""

    wrong: list[str] = field(default_factory=list)
    combinations: int = 0

    def compare(self, where: str, expected: str, found: str) -> None:
        self.combinations += 1
        if expected != found:
            self.wrong.append(f"{where}: {found} instead of {expected}")


def methods_of_the_protos() -> set[str]:
    """The methods of all protos of `loraplex.v1`."""
    found = set()
    for proto in PROTOS.glob("*.proto"):
        module = importlib.import_module(f"loraplex.v1.{proto.stem}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            found |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    return found


async def methods_of_the_server(channel: grpc.aio.Channel, credential: Credential) -> set[str]:
    """The methods that the server's reflection knows, those of all services."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    question = reflection_pb2.ServerReflectionRequest
    call = stub.ServerReflectionInfo(metadata=credential.metadata)
    await call.write(question(list_services=""))
    listed = (await call.read()).list_services_response.service
    found = set()
    for service in listed:
        await call.write(question(file_containing_symbol=service.name))
        for data in (await call.read()).file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            for each in file.service:
                name = f"{file.package}.{each.name}"
                if name == service.name:
                    found |= {f"/{name}/{method.name}" for method in each.method}
    await call.done_writing()
    return found


def keys_and_principals(folder: Path) -> list[Credential]:
    """Writes the files; returns every kind of credential, those that must fail first."""
    tables = [
        f"[principals.{name}]\nroles = {sorted(map(str, has))}\n" for name, has in ROLES.items()
    ]
    tables = [text + 'adapters = "*"\nbase = true\nimports = ""\n' for text in tables]
    tables = [
        f'{text}certificates = ["{name}.example"]\n'
        for name, text in zip(ROLES, tables, strict=True)
    ]
    (folder / "principals.toml").write_text("".join(tables))
    keys = KeyFile(folder / "keys.json")
    texts = {name: keys.add(name)[1] for name in ROLES}
    _, expired = keys.add("all", expires=datetime.now(UTC) - timedelta(seconds=5))
    revoked, revoked_text = keys.add("all")
    keys.revoke(revoked.id)
    _, removed = keys.add("nobody-now")
    other = texts["all"][:-1] + ("0" if texts["all"][-1] != "0" else "1")
    bad = {
        "an unknown key": f"Bearer lpx_{'0' * 10}_{'0' * 64}",
        "a key with a wrong secret": f"Bearer {other}",
        "a part of a key": f"Bearer {texts['all'][:-1]}",
        "a key in another scheme": f"Basic {texts['all']}",
        "a key without a scheme": texts["all"],
        "an expired key": f"Bearer {expired}",
        "a revoked key": f"Bearer {revoked_text}",
        "the key of a removed principal": f"Bearer {removed}",
        "an empty value": "",
        "a long value": "Bearer " + "x" * 5000,
    }
    found = [Credential("no credential", ())]
    found += [Credential(name, (("authorization", text),)) for name, text in bad.items()]
    right = {name: ("authorization", f"Bearer {text}") for name, text in texts.items()}
    found.append(Credential("a right key twice", (right["all"],) * 2))
    found.append(Credential("two right keys", (right["read"], right["infer"])))
    for name, has in ROLES.items():
        found.append(Credential(f"the key of {name}", (right[name],), frozenset(has)))
    return found


def certificates(credentials: list[Credential]) -> list[Credential]:
    """What callers of a server that asks for certificates show. A key or a token decides alone."""
    right = {each.name: each for each in credentials}
    found = [
        Credential(f"the certificate of {name}", (), frozenset(has), (f"{name}.example",))
        for name, has in ROLES.items()
    ]
    every = ("all.example",)
    found += [
        Credential("a certificate of nobody", (), None, ("nobody.example",)),
        Credential("a certificate of two", (), None, ("all.example", "read.example")),
        Credential("a wildcard certificate", (), None, ("*.example",)),
    ]
    for name in ("a revoked key", "a right key twice", "the key of none", "the key of read"):
        each = right[name]
        found.append(Credential(f"{name}, certified", each.metadata, each.roles, every))
    return found


def expected(method: str, credential: Credential, serves_managing: bool) -> str:
    """What the table of roles says. Independent of the code that enforces it."""
    if method in OPEN_METHODS:
        return OK
    if credential.roles is None:
        return UNAUTHENTICATED
    if not METHOD_ROLES[method] & credential.roles:
        return DENIED
    return OK if serves_managing or not is_managing(method) else DENIED


async def outcome(channel: grpc.aio.Channel, method: str, credential: Credential) -> str:
    """Calls a method of any kind with one empty request; says whether the caller got in."""
    call = channel.unary_stream(method)(b"", metadata=credential.metadata, timeout=60)
    try:
        answered = await call.read() is not grpc.aio.EOF
        code = grpc.StatusCode.OK if answered else await call.code()
    except grpc.aio.AioRpcError as error:
        code = error.code()
    call.cancel()
    return OK if code in ADMITTED else code.name


@contextmanager
def serving(folder: Path, **settings: object) -> Iterator[dict[str, bool]]:
    """A server process with the files in `folder`.

    Yields its addresses, and whether calls that manage are served there.
    """
    file = write_config(
        folder,
        principals=folder / "principals.toml",
        keys=folder / "keys.json",
        manage_host="127.0.0.1",
        manage_port=0,
        audit_log=folder / "audit.jsonl",
        **settings,
    )
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "loraplex_server.cli", "serve", "--config", str(file)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"},
        )
    try:
        words = process.stdout.readline().split()
        assert words[:1] == ["ready:"], (folder / "server.log").read_text()
        yield {words[2]: False, words[6]: True}
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def test_every_method_has_an_entry_of_its_own() -> None:
    services = health.SERVICE_NAME, "grpc.reflection.v1alpha.ServerReflection"
    ours = {method for method in METHOD_ROLES if method.startswith("/loraplex.v1.")}
    assert ours == methods_of_the_protos()
    for method in (METHOD_ROLES.keys() - ours) | OPEN_METHODS:
        assert method.split("/")[1] in services
    assert not METHOD_ROLES.keys() & OPEN_METHODS
    assert all(METHOD_ROLES.values())


EVERYTHING = METHOD_ROLES.keys() | OPEN_METHODS
APART = [("grpc.use_local_subchannel_pool", 1)]


async def test_each_method_admits_exactly_the_callers_with_its_roles(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    credentials, outcomes = keys_and_principals(tmp_path), Outcomes()
    with serving(tmp_path) as addresses:
        for address, manages in addresses.items():
            async with grpc.aio.insecure_channel(address, APART) as channel:
                assert await methods_of_the_server(channel, credentials[-1]) == EVERYTHING
                await ask_all(channel, credentials, manages, outcomes)
    conclude(record_property, outcomes, 2 * len(EVERYTHING) * len(credentials))
    written = (tmp_path / "server.log").read_text() + (tmp_path / "audit.jsonl").read_text()
    shown = [text for each in credentials for _, text in each.metadata if "lpx_" in text]
    assert not [text for text in shown if text.rpartition("_")[2] in written]


async def test_each_method_admits_exactly_the_certificates_of_its_roles(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    credentials, outcomes = certificates(keys_and_principals(tmp_path)), Outcomes()
    ours, clients = Authority(tmp_path / "ours"), Authority(tmp_path / "clients")
    pair = ours.issue("server")
    tls = {
        "tls_certificate": pair.chain,
        "tls_key": pair.key,
        "tls_client_ca": clients.file,
    }
    with serving(tmp_path, **tls) as addresses:
        for number, each in enumerate(credentials):
            own = clients.issue(f"client-{number}", *each.certificate).channel_arguments()
            encrypted = grpc.ssl_channel_credentials(ours.pem, **own)
            for address, manages in addresses.items():
                async with grpc.aio.secure_channel(address, encrypted, APART) as channel:
                    await ask_all(channel, [each], manages, outcomes)
    conclude(record_property, outcomes, 2 * len(EVERYTHING) * len(credentials))


def conclude(record: pytest.RecordProperty, outcomes: Outcomes, combinations: int) -> None:
    """Reports the numbers to `make test-security`; fails if an outcome was wrong."""
    record("methods", len(EVERYTHING))
    record("roles", len(Role))
    record("combinations", outcomes.combinations)
    record("wrong", len(outcomes.wrong))
    assert outcomes.combinations == combinations
    assert not outcomes.wrong, "\n".join(outcomes.wrong)


async def ask_all(
    channel: grpc.aio.Channel,
    credentials: list[Credential],
    serves_managing: bool,
    outcomes: Outcomes,
) -> None:
    """Calls every method with every credential, a few at a time."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(method: str, credential: Credential) -> None:
        async with turn:
            found = await outcome(channel, method, credential)
        where = f"{method} with {credential.name}"
        outcomes.compare(where, expected(method, credential, serves_managing), found)

    await asyncio.gather(*(one(method, each) for method in EVERYTHING for each in credentials))


def test_a_method_without_an_entry_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first test of this module fails for a new RPC."""
    entries: Mapping[str, frozenset[Role]] = {
        name: roles for name, roles in METHOD_ROLES.items() if not name.endswith("/PinAdapter")
    }
    monkeypatch.setitem(globals(), "METHOD_ROLES", entries)
    with pytest.raises(AssertionError):
        test_every_method_has_an_entry_of_its_own()
