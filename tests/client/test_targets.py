"""A key goes over an unencrypted connection only if that certainly stays on this machine."""

from __future__ import annotations

import pytest
from loraplex import AsyncClient, Client, InvalidRequest
from loraplex.access.targets import stays_on_this_machine

KEY = "lpx_abc_" + "s3cret" * 7

HERE = [
    "127.0.0.1:50051",
    "127.0.0.1",
    "127.255.3.4:1",
    "localhost:50051",
    "localhost",
    "[::1]:50051",
    "[0:0:0:0:0:0:0:1]:1",
    "dns:localhost:50051",
    "dns:///localhost:50051",
    "dns:///127.0.0.1:50051",
    "ipv4:127.0.0.1:50051",
    "ipv4:127.0.0.1:1,127.0.0.2:2",
    "ipv6:[::1]:50051",
    "unix:relative.sock",
    "unix:/run/loraplex.sock",
    "unix:///run/loraplex.sock",
    "unix-abstract:loraplex",
]

ELSEWHERE = [
    "example.com:50051",
    "10.0.0.1:50051",
    "0.0.0.0:50051",
    "[::]:50051",
    "localhost.evil.com:50051",
    "localhost.:50051",
    "LOCALHOST:50051",
    "Localhost:50051",
    "localhost@evil.com:50051",
    "evil.com#localhost:50051",
    "localhost:50051@evil.com",
    "localhost:50051/evil.com",
    "localhost:50051,evil.com:50051",
    "localhost:https",
    "localhost:-1",
    "localhost:",
    " localhost:50051",
    "localhost:50051\n",
    "local\u0000host:1",
    "localhost%2eevil.com:1",
    "127.0.0.1.evil.com:50051",
    "127.1:50051",
    "127.0.0.1.:50051",
    "0x7f.1:50051",
    "0x7f000001:50051",
    "2130706433:50051",
    "017700000001:50051",
    "127.0.0.01:50051",
    "0127.0.0.1:50051",
    "127.0.0.256:1",
    "127.0.0.1%eth0:1",
    "\u0661\u0662\u0667.0.0.1:1",  # digits of another script
    "\uff11\uff12\uff17.0.0.1:1",
    "::1",
    "::1:50051",
    "[::1%eth0]:50051",
    "[::ffff:127.0.0.1]:50051",
    "[::ffff:10.0.0.1]:50051",
    "[::127.0.0.1]:50051",
    "[fe80::1]:50051",
    "[::1].evil.com:1",
    "dns://8.8.8.8/localhost:50051",  # that name server is asked what localhost is
    "dns:////localhost:50051",
    "dns:///evil.com:50051",
    "DNS:///localhost:50051",
    "ipv4:127.0.0.1:1,10.0.0.1:1",
    "ipv4:10.0.0.1:1,127.0.0.1:1",
    "ipv4:127.0.0.1:1,",
    "ipv4:",
    "ipv6:[::1]:1,[fe80::1]:1",
    "ipv6:::1",
    "unix:",
    "unix://host/run/loraplex.sock",
    "UNIX:/run/loraplex.sock",
    "vsock:1:2",
    "xds:///localhost",
    "passthrough:localhost",
    "localhost:50051 evil.com:1",
]


@pytest.mark.parametrize("target", HERE)
def test_what_certainly_stays_on_this_machine_may_have_a_key(target: str) -> None:
    assert stays_on_this_machine(target)
    Client(target, key=KEY).close()


@pytest.mark.parametrize("target", ELSEWHERE)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_that_others_could_read_is_refused_before_anything_is_sent(
    target: str, kind: type
) -> None:
    assert not stays_on_this_machine(target)
    with pytest.raises(InvalidRequest) as caught:
        kind(target, key=KEY)
    assert KEY not in str(caught.value)
    assert "s3cret" not in repr(caught.value)
    (violation,) = caught.value.violations
    assert violation.field == "key"


@pytest.mark.parametrize("target", [*HERE, "example.com:50051"])
def test_without_a_key_every_address_may_be_unencrypted(target: str) -> None:
    Client(target).close()


@pytest.mark.parametrize(
    "target",
    ["https://example.com", "HTTP://example.com:80", "grpc://h:1", "tcp://h", "a b://h", "", "  "],
)
def test_an_address_of_the_web_is_refused_with_what_to_give(target: str) -> None:
    with pytest.raises(InvalidRequest, match="give HOST:PORT"):
        Client(target)


def test_a_password_in_an_address_of_the_web_is_not_repeated() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Client("https://user:hunter2@example.com")
    assert "hunter2" not in str(caught.value) + repr(caught.value)
