"""A server that says what a test wants, in threads of this process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from agentropy.agents.engines.http_engine import HTTPEngine

from .serving import VOCABULARY

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Scripted:
    """Answers ``GET`` from ``pages`` and ``POST`` with what ``reply(path, body)`` returns: a status, JSON, headers.

    Use as a context manager. ``bodies`` are those of all posts so far; ``most`` is how many ran at once.
    """

    def __init__(self, reply: Callable[[str, Any], Reply], owner: str = "somebody", **about: Any) -> None:
        self.reply = reply
        self.bodies: list[Any] = []
        self.pages: dict[str, Reply] = {
            "/health": (200, {}),
            "/v1/models": (200, {"data": [{"id": "m", "owned_by": owner, **about}]}),
        }
        self.most = self._now = 0
        self.silent = threading.Event()
        """While set, nothing is answered."""
        self._lock = threading.Lock()
        self._over = threading.Event()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                scripted._wait()
                self._answer(scripted.pages.get(self.path, (404, {"detail": "Not Found"})))

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                body = json.loads(content) if self.headers["content-type"] == "application/json" else content
                with scripted._lock:
                    scripted.bodies.append(body)
                    scripted._now += 1
                    scripted.most = max(scripted.most, scripted._now)
                try:
                    scripted._wait()
                    self._answer(scripted.reply(self.path, body))
                finally:
                    with scripted._lock:
                        scripted._now -= 1

            def _answer(self, reply: Reply) -> None:
                status, said, headers = reply if len(reply) == 3 else (*reply, {})
                content = said if isinstance(said, bytes) else json.dumps(said).encode()
                try:
                    self.send_response(status)
                    for name, value in {**headers, "content-length": str(len(content))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def stop(self) -> None:
        """Listen no more; connections that are open stay."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.stop()

    def _wait(self) -> None:
        while self.silent.is_set() and not self._over.wait(0.01):
            pass


def quick(url: str, **options: Any) -> HTTPEngine:
    """An engine that tries again at once."""
    return HTTPEngine(url, **({"backoff": 0.01, "vocabulary": VOCABULARY, "patience": 30.0} | options))


def said(body: Any, tokens: list[int] | None = None) -> tuple[int, dict[str, Any]]:
    """What a server of vLLM's kind answers: the sampled tokens, which here repeat the prompt's last one."""
    drawn = [body["prompt"][-1]] * body["max_tokens"] if tokens is None else tokens
    names = [f"token_id:{token}" for token in drawn]
    logprobs = {"tokens": names, "token_logprobs": [-1.0] * len(drawn), "top_logprobs": [{n: -1.0} for n in names]}
    return 200, {"choices": [{"token_ids": drawn, "finish_reason": "length", "text": "", "logprobs": logprobs}]}


def obedient(path: str, body: Any) -> tuple[int, dict[str, Any]]:
    return said(body)
