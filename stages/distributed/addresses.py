"""Checks, on several hosts, of the addresses that torchrun and gloo tell the other hosts."""

import socket
from collections.abc import Mapping
from contextlib import suppress

from softcache.base.errors import UsageError


def check_address_of_first(address: str) -> None:
    """Raise UsageError, on every rank, where torchrun tells other hosts an address that is of each host itself."""
    if address == "localhost" or address.startswith("127."):
        raise UsageError(
            f"torchrun names '{address}' as the address of rank 0's host, and every host is that to itself: add"
            " --local-addr ADDRESS to torchrun, on each host with its own address"
        )


def check_address_of_host(environment: Mapping[str, str]) -> None:
    """Raise UsageError where gloo would tell the other hosts an address that only this host can reach."""
    if environment.get("GLOO_SOCKET_IFNAME"):
        return
    with suppress(OSError):  # a name that has no address: gloo says so
        name = socket.gethostname()
        if (address := socket.gethostbyname(name)).startswith("127."):
            raise UsageError(
                f"the name of this host, '{name}', means {address}, where other hosts cannot reach it: set"
                " GLOO_SOCKET_IFNAME to its network interface, as in GLOO_SOCKET_IFNAME=eth0 torchrun …"
            )
