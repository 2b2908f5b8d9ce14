"""The network between the ranks of one run."""

from __future__ import annotations

import socket

import psutil


def interface_towards(address: str, port: int) -> str:
    """Return the name of the network interface that holds the address from which this machine reaches another. Nothing is sent.
    OSError where there is none."""
    family, _, _, _, target = socket.getaddrinfo(address, port or 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        mine = probe.getsockname()[0]
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == mine for entry in entries):
            return name
    raise OSError(f"no network interface has the address {mine}, from which {address} is reached")
