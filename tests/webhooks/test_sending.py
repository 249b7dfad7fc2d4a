"""Where webhooks go, when they go again, and which addresses they never reach."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address
from itertools import pairwise
from typing import Any

import pytest

from idempotency.errors import ConfigurationError
from idempotency.webhooks import Endpoint, standard_webhooks_schedule
from idempotency.webhooks._addresses import AddressRefusedError, allowing, is_public, resolve

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


@pytest.mark.parametrize(
    "url", ["https://example.com", "http://example.com:8080/hooks?account=7&x=@", "https://[2606:4700::1111]/a%20b"]
)
def test_endpoint(url: str) -> None:
    """Its description has no secret."""
    endpoint = Endpoint(url, [SECRET])

    assert endpoint == Endpoint(url, (SECRET,))
    assert SECRET[6:] not in repr(endpoint)


@pytest.mark.parametrize(
    "url",
    [
        "example.com/hooks",
        "ftp://example.com",
        "https://",
        "https:///hooks",
        "https://user@example.com/",
        "https://user:password@example.com/",
        "https://@example.com/",
        "https://example.com/#part",
        "https://example.com\\@10.0.0.1/",
        "https://example.com/\r\nx: y",
        "https://example.com/ x",
        "https://exämple.com/",
        "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11/",
        "http://127%2e0.0.1/",
        "https://example.com:99999/",
        "https://example.com:0/",
        "https://[::1/",
        b"https://example.com/",
        None,
    ],
)
def test_url_that_cannot_be_an_endpoint(url: Any) -> None:
    """Nothing of it is in the error: it may have a password in it."""
    with pytest.raises(ConfigurationError) as caught:
        Endpoint(url, [SECRET])

    assert str(caught.value) == "an endpoint has an http or https URL in ASCII, without user, password and fragment"


def test_schedule_has_ten_attempts_in_three_days() -> None:
    """The pauses of the specification: 5 s, 5 min, 30 min, then 2, 5, 10, 14, 20 and 24 hours, a tenth more or less."""
    pauses = [5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400]

    drawn = [[standard_webhooks_schedule(attempt) or 0 for attempt in range(1, 10)] for _ in range(100)]

    for each in drawn:
        assert all(0.9 * pause <= given <= 1.1 * pause for pause, given in zip(pauses, each, strict=True))
    assert all(len(set(column)) > 1 for column in zip(*drawn, strict=True))
    assert all(first < second for first, second in pairwise(drawn[0]))
    assert standard_webhooks_schedule(10) is None


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "169.254.170.2",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::a00:1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_address_that_is_not_public(address: str) -> None:
    """Private, loopback, link-local, multicast, reserved, metadata, and IPv4 in IPv6."""
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "100.128.0.1", "172.32.0.1", "192.169.0.1", "2606:4700::1111", "64:ff9b::808:808"],
)
def test_address_that_is_public(address: str) -> None:
    """Also an IPv4 address as a network without IPv4 reaches it."""
    assert is_public(ip_address(address))


def test_networks_are_allowed_beside_what_a_check_approves() -> None:
    """An IPv4 network does not allow the same addresses in IPv6."""
    check = allowing(["127.0.0.0/8", "fd00::/8"], is_public)

    found = {text: check(ip_address(text)) for text in ("127.0.0.1", "fd00::1", "8.8.8.8", "10.0.0.1", "::ffff:7f00:1")}
    assert found == {"127.0.0.1": True, "fd00::1": True, "8.8.8.8": True, "10.0.0.1": False, "::ffff:7f00:1": False}


@pytest.mark.parametrize("allow", ["10.0.0.0/8", ["10.0.0.1/8"], ["example.com"]])
def test_what_is_no_network(allow: Any) -> None:
    """It is refused when the publisher is made."""
    with pytest.raises(ConfigurationError, match="allow must be a list of networks"):
        allowing(allow, is_public)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0", "::1", "localhost"],
)
async def test_host_that_means_this_machine(host: str) -> None:
    """However it is written, what the system makes of it is checked."""
    with pytest.raises(AddressRefusedError, match="is not allowed"):
        await resolve(host, 80, is_public)


def answer(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Make the system's resolver find these addresses for every name."""

    def getaddrinfo(host: object, port: int, *args: object, **kwargs: object) -> list[Any]:
        family = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(family[":" in each], socket.SOCK_STREAM, 6, "", (each, port)) for each in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


async def test_name_with_a_public_and_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No order of them lets it pass."""
    for addresses in (("8.8.8.8", "10.0.0.1"), ("10.0.0.1", "8.8.8.8"), ("2606:4700::1111", "::1")):
        answer(monkeypatch, *addresses)
        with pytest.raises(AddressRefusedError):
            await resolve("both.example", 443, is_public)


async def test_name_with_public_addresses_has_them_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system sorts them; each is tried once."""
    answer(monkeypatch, "2606:4700::1111", "8.8.8.8", "8.8.8.8")

    assert await asyncio.wait_for(resolve("public.example", 443, is_public), 5) == ["2606:4700::1111", "8.8.8.8"]
