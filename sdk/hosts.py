"""Whether traffic to an address stays on this machine: both sides ask before they let anything travel in plaintext."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a host name or address, IPv6 with or without brackets, is this machine's loopback. Nothing is resolved."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
