"""Ports for servers that are started for a while, here and in the tests."""

import socket


def free_ports(number: int) -> list[int]:
    """Ports nobody listens on now. All are held open until the last is found, so that no two are the same."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
