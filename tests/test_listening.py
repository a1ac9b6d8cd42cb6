"""Where servers of this package listen, and what they say when they cannot."""

import socket

import pytest

from agentropy.errors import UsageError
from agentropy.listening import listen, url_of


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("localhost", None), ("::1", "[::1]")])
def test_a_free_port_is_taken_and_its_url_leads_there(host: str, shown: str | None) -> None:
    try:
        listener = listen(host, 0)
    except UsageError:
        if ":" not in host:
            raise
        pytest.skip("this machine has no IPv6")
    with listener:
        port = listener.getsockname()[1]
        assert shown is None or url_of(listener) == f"http://{shown}:{port}"
        with socket.create_connection(listener.getsockname()[:2]) as client, listener.accept()[0] as server:
            client.sendall(b"hello")
            assert server.recv(5) == b"hello"
            assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_what_cannot_be_had_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}: .*in use"):
            listen("127.0.0.1", port)
    with pytest.raises(UsageError, match=r"cannot listen on no\.such\.host\.invalid port 0: "):
        listen("no.such.host.invalid", 0)
    with pytest.raises(UsageError, match="cannot listen on port 70000; expected 0 to 65535"):
        listen("127.0.0.1", 70000)
