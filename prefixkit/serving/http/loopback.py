"""Which hosts are this machine, by a name that nobody else can take."""

from __future__ import annotations

from ipaddress import ip_address


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, is `localhost` or an address of the loopback interface."""
    bare = host.removeprefix("[").removesuffix("]").partition("%")[0]
    try:
        return ip_address(bare).is_loopback
    except ValueError:
        return host.lower() == "localhost"
