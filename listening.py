"""The sockets that servers of this package answer on.

- ``listen``: one of them. ``url_of``: its address.
"""

from __future__ import annotations

import socket

from .errors import UsageError

LARGEST_PORT = 65535


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket, whose connections notice within a minute that the other side is gone.

    Args:
        host: name or address, of either family.
        port: 0 for any free one.

    Raises:
        UsageError: there is no such port, or the address cannot be had.
    """
    if not 0 <= port <= LARGEST_PORT:
        raise UsageError(f"cannot listen on port {port}; expected 0 to {LARGEST_PORT}")
    try:
        # asyncio switches Nagle's delay off, 40 ms an answer, only where it sees that the protocol is TCP.
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # accepted sockets inherit these
            for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
                if hasattr(socket, option):
                    listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            listener.bind(address)
            listener.listen(2048)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
