"""Which addresses a sender may connect to: those of the public internet, unless it is said otherwise.

Endpoints are chosen by users, and one may name a machine of the sender's own network (server-side request forgery).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from idempotency.errors import ConfigurationError

Address = IPv4Address | IPv6Address
AddressCheck = Callable[[Address], bool]

# From the registries of IANA of special-purpose addresses. A table of our own: ipaddress.is_global differs between
# versions of Python, and does not know what a cloud has at a public address.
_NOT_PUBLIC_4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared by carriers; metadata of Alibaba Cloud
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # the platform of Azure
        "169.254.0.0/16",  # link-local; metadata of most clouds
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments; metadata of Oracle Cloud
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved; broadcast
    )
)

_UNICAST_6 = IPv6Network("2000::/3")
"""Outside are loopback, link-local, private, multicast, metadata at fd00:ec2::254, and IPv4 in IPv6 (::ffff:0:0/96)."""

_NOT_PUBLIC_6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments; Teredo, which contains an IPv4 address
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, which contains an IPv4 address
        "3fff::/20",  # documentation
    )
)

_NAT64 = IPv6Network("64:ff9b::/96")
"""How a network without IPv4 reaches it: the last four bytes are the IPv4 address."""


class AddressRefusedError(Exception):
    """The host of an endpoint has an address that must not be connected to; the message names the address only."""


def is_public(address: Address) -> bool:
    """Return whether an address is one of the public internet, and of no cloud's metadata."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        return address in _UNICAST_6 and not any(address in network for network in _NOT_PUBLIC_6)
    return not any(address in network for network in _NOT_PUBLIC_4)


def allowing(networks: Iterable[str], check: AddressCheck) -> AddressCheck:
    """Return the check that approves what ``check`` does, and addresses of ``networks``, such as ``"10.1.0.0/16"``.

    Raises :class:`~idempotency.errors.ConfigurationError` for what is no network.
    """
    if isinstance(networks, str):
        raise ConfigurationError(f"allow must be a list of networks, not {networks!r}")
    try:
        allowed = tuple(ip_network(each) for each in networks)
    except ValueError as error:
        raise ConfigurationError(f"allow must be a list of networks, such as '10.1.0.0/16': {error}") from error
    if not allowed:
        return check
    return lambda address: any(address in network for network in allowed) or check(address)


async def resolve(host: str, port: int, check: AddressCheck) -> list[str]:
    """Return the addresses of a host, in the order in which they are to be tried, if ``check`` approves all of them.

    Raises :class:`AddressRefusedError` if it does not: a name that also has an address inside is not one to trust; and
    for what can be no name. Raises OSError if the host is not found.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise AddressRefusedError("the host is malformed") from error
    # With flow and scope there is more in it than an address.
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    for text in addresses:
        if not check(ip_address(text)):
            raise AddressRefusedError(f"the address {text} is not allowed")
    return addresses
