"""Claims about the server's protocol: who is let in, what is played once, what is limited, and what is freed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("msgpack")

import httpx

from agentropy.envs.serve import wire
from agentropy.envs.serve.arguments import check
from agentropy.envs.serve.running import BackgroundServer
from agentropy.envs.serve.settings import Settings
from agentropy.errors import UsageError

HERE = Path(__file__).parent
OBEDIENT, FORGETFUL = "pool_worlds:Obedient-v0", "pool_worlds:Forgetful-v0"
TOKENS = (secrets.token_urlsafe(24), secrets.token_urlsafe(24))


@pytest.fixture(scope="module", autouse=True)
def worlds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield


@contextlib.contextmanager
def serving(**settings: Any) -> Iterator[BackgroundServer]:
    defaults: dict[str, Any] = {"env_ids": (OBEDIENT, FORGETFUL), "port": 0, "workers": 1, "max_sessions": 8}
    with BackgroundServer(Settings(**(defaults | settings))) as server:
        yield server


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    with serving(workers=2, max_sessions=32, allowed=frozenset({"fault"}), max_body=1 << 20) as server:
        yield server


class Session:
    """A session in plain HTTP, so that the tests say what is sent."""

    def __init__(self, url: str, env_id: str = OBEDIENT, form: str = wire.JSON, token: str | None = None) -> None:
        headers = {"content-type": form} | ({} if token is None else {"authorization": f"Bearer {token}"})
        self.client = httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False)
        self.name, self.number, self.form = secrets.token_hex(16), 0, form
        self.opened = self.open(env_id)

    def open(self, env_id: str = OBEDIENT, **arguments: Any) -> httpx.Response:
        body = wire.encode({"env_id": env_id, "arguments": arguments}, self.form)
        return self.client.put(f"/v1/sessions/{self.name}", content=body)

    def post(self, op: str, number: int | None = None, raw: bytes | None = None, **body: Any) -> httpx.Response:
        self.number = self.number + 1 if number is None else number
        content = wire.encode(body, self.form) if raw is None else raw
        headers = {} if raw is None else {"content-type": wire.BYTES}
        path = f"/v1/sessions/{self.name}/{op}?number={self.number}"
        return self.client.post(path, content=content, headers=headers)

    def play(self, op: str, **body: Any) -> dict[str, Any]:
        response = self.post(op, **body)
        assert response.status_code == 200, response.text
        return wire.decode(response.content, self.form)

    def close(self) -> httpx.Response:
        return self.client.delete(f"/v1/sessions/{self.name}")


def problem(response: httpx.Response, status: int, code: wire.Code) -> str:
    """The detail of an error, which must be of this kind."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == wire.PROBLEM
    body = response.json()
    assert (body["status"], body["code"]) == (status, code)
    return body["detail"]


def until(happened: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(done)


def sessions(url: str) -> int:
    return httpx.get(f"{url}/health", trust_env=False).json()["sessions"]


def metric(url: str, name: str) -> int:
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"agentropy_{name} ")), 0)


@pytest.mark.parametrize("form", [wire.JSON, wire.MSGPACK])
def test_an_episode_in_either_format(server: BackgroundServer, form: str) -> None:
    session = Session(server.url, form=form)
    assert session.opened.status_code == 201 and session.opened.headers["content-type"] == form
    about = wire.decode(session.opened.content, form)
    assert about["name"] == "ObedientEnv" and about["observation_space"]["max_length"] == 1000
    first = session.play("reset", seed=7, options={"task": "a"})
    assert first["observation"].startswith("a 0 ") and first["info"]["task"] == "a"
    assert session.play("step", action="look")["observation"].startswith("a 1 ")
    assert session.play("step", action="end")["terminated"] is True
    assert session.close().status_code == 204
    assert "does not know" in problem(session.close(), 404, wire.Code.UNKNOWN_SESSION)


def test_a_request_sent_again_is_answered_again_and_played_once(server: BackgroundServer) -> None:
    session = Session(server.url)
    session.play("reset", seed=1, options={"task": "a"})
    first = session.post("step", 5, action="look")
    again = session.post("step", 5, action="look")
    assert first.status_code == 200 and again.content == first.content
    assert session.post("step", 6, action="look").json()["observation"].startswith("a 2 ")
    problem(session.post("step", 6, action="another"), 409, wire.Code.STALE)
    problem(session.post("step", 5, action="look"), 409, wire.Code.STALE)
    assert session.client.get(f"/v1/sessions/{session.name}").json()["number"] == 6
    session.close()


def test_a_fork_without_room_is_tried_again_when_it_is_sent_again() -> None:
    with serving(max_sessions=2) as server:
        session, other, name = Session(server.url), Session(server.url), secrets.token_hex(16).encode()
        session.play("reset", options={"task": "a"})
        problem(session.post("fork", 5, raw=name), 503, wire.Code.FULL)
        other.close()
        assert until(lambda: session.post("fork", 5, raw=name).status_code == 200)
        assert sessions(server.url) == 2


def test_a_request_sent_again_while_it_is_played_waits_for_the_same_answer(server: BackgroundServer) -> None:
    session = Session(server.url)
    session.play("reset", seed=1, options={"task": "a"})
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda _: session.post("step", 9, action="sleep 0.3").content, range(3)))
    assert len(set(answers)) == 1 and json.loads(answers[0])["observation"].startswith("a 1 ")
    session.close()


def test_another_request_meanwhile_finds_the_session_busy(server: BackgroundServer) -> None:
    session = Session(server.url)
    session.play("reset", options={"task": "a"})
    slow = threading.Thread(target=session.post, args=("step", 2), kwargs={"action": "sleep 0.5"})
    slow.start()
    assert until(lambda: session.client.get(f"/v1/sessions/{session.name}").json()["busy"])
    response = session.post("step", 3, action="look")
    problem(response, 409, wire.Code.BUSY)
    assert response.headers["retry-after"] == "1"
    slow.join()
    session.close()


def test_opening_twice_opens_once(server: BackgroundServer) -> None:
    before = sessions(server.url)
    session = Session(server.url)
    again = session.open()
    assert again.status_code == 200 and again.content == session.opened.content
    assert sessions(server.url) == before + 1
    problem(session.open(FORGETFUL), 409, wire.Code.EXISTS)
    session.close()


def test_a_step_needs_an_episode(server: BackgroundServer) -> None:
    session = Session(server.url)
    assert "reset" in problem(session.post("step", action="look"), 409, wire.Code.RESET_NEEDED)
    session.close()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ({"env_id": "Obedient-v9"}, "no environment"),
        ({"env_id": "pool_worlds:Obedient-v"}, "did you mean 'pool_worlds:Obedient-v0'"),
        ({"env_id": 3}, "must be the id"),
        ({"env_id": "os:system"}, "no environment"),
        ({"env_id": OBEDIENT, "arguments": {"command": "rm"}}, "--allow command"),
        ({"env_id": OBEDIENT, "arguments": [1]}, "names and values"),
        ({"env_id": OBEDIENT, "arguments": {"render_mode": "human"}}, "render_mode"),
        ({"env_id": OBEDIENT, "arguments": {"nonsense": 3}}, "nonsense"),
        ([], "an object"),
    ],
)
def test_only_registered_environments_with_harmless_arguments_are_opened(
    server: BackgroundServer, body: Any, what: str
) -> None:
    before = sessions(server.url)
    response = httpx.put(f"{server.url}/v1/sessions/{secrets.token_hex(16)}", json=body, timeout=30, trust_env=False)
    assert what in problem(response, 422, wire.Code.USAGE)
    assert sessions(server.url) == before


def test_words_are_allowed_by_name_and_numbers_everywhere() -> None:
    ids = ("a",)
    assert check("a", {"split": "train", "rooms": 3, "counts": {"x": 1}, "list": [1.5, None]}, ids, ())
    assert check("a", {"task_types": ["pick_two", "look_at"], "simplifications": "a,b"}, ids, ())
    refused: list[dict[str, Any]] = [{"data": "x"}, {"list": ["x"]}, {"deep": {"x": [{"y": "z"}]}}]
    refused += [{"retriever": "http://10.0.0.1"}, {"tools": ["os:system"]}, {"source": "../x"}, {"split": b"x"}]
    for arguments in refused:
        with pytest.raises(UsageError, match="may not set"):
            check("a", arguments, ids, ())
        assert check("a", arguments, ids, {"*"}) == arguments


@pytest.mark.parametrize(
    ("op", "body", "code", "status"),
    [
        ("step", {}, wire.Code.USAGE, 422),
        ("step", {"action": 3}, wire.Code.USAGE, 422),
        ("reset", {"seed": -1}, wire.Code.USAGE, 422),
        ("reset", {"seed": "x"}, wire.Code.USAGE, 422),
        ("reset", {"options": 1}, wire.Code.USAGE, 422),
        ("reset", {"generator": "{}"}, wire.Code.MALFORMED, 400),
        ("call", {"method": "close"}, wire.Code.USAGE, 422),
        ("call", {"method": "__class__"}, wire.Code.USAGE, 422),
        ("call", {"method": "tasks", "arguments": {"no": 1}}, wire.Code.USAGE, 422),
        ("replay", {"actions": [1], "digest": ""}, wire.Code.USAGE, 422),
    ],
)
def test_a_wrong_body_is_refused_and_the_episode_goes_on(
    server: BackgroundServer, op: str, body: dict[str, Any], code: wire.Code, status: int
) -> None:
    session = Session(server.url)
    session.play("reset", options={"task": "a"})
    assert problem(session.post(op, **body), status, code)
    assert session.play("step", action="look")["observation"].startswith("a 1 ")
    session.close()


def test_wrong_requests_get_their_status(server: BackgroundServer) -> None:
    session = Session(server.url)
    path = f"/v1/sessions/{session.name}/step?number=1"
    client = session.client
    problem(client.post(path, content=b"x", headers={"content-type": "text/plain"}), 415, wire.Code.USAGE)
    problem(client.post(path, content=b"not json"), 400, wire.Code.MALFORMED)
    problem(client.post(path.replace("number=1", "number=x"), content=b"{}"), 422, wire.Code.USAGE)
    problem(client.post(path.replace("/step", "/explode"), content=b"{}"), 404, wire.Code.NOT_FOUND)
    problem(client.put("/v1/sessions/short", content=b"{}"), 422, wire.Code.USAGE)
    problem(client.get("/nowhere"), 404, wire.Code.NOT_FOUND)
    problem(client.post("/health"), 405, wire.Code.NOT_FOUND)
    session.close()


def test_too_large_a_request_is_refused_with_and_without_its_length(server: BackgroundServer) -> None:
    session = Session(server.url)
    path = f"/v1/sessions/{session.name}/step?number=1"
    problem(session.client.post(path, content=b"x" * (1 << 20) + b"x"), 413, wire.Code.TOO_LARGE)
    problem(session.client.post(path, content=(b"x" * 4096 for _ in range(400))), 413, wire.Code.TOO_LARGE)
    session.play("reset", options={"task": "a"})
    assert session.play("step", action="\ud800é" + "x" * 100_000)["observation"].startswith("a 1 ")
    session.close()


def test_tokens_are_needed_and_tell_clients_apart() -> None:
    with serving(tokens=TOKENS, max_sessions_per_client=1) as server:
        assert httpx.get(f"{server.url}/health", trust_env=False).json()["status"] == "ok"
        for token in (None, "wrong", TOKENS[0] + "x", TOKENS[0][:-1], "é"):
            bearer = {} if token is None else {"authorization": f"Bearer {token}".encode()}
            for path in ("/metrics", "/v1/envs", "/nowhere", f"/v1/sessions/{'0' * 32}"):
                response = httpx.get(f"{server.url}{path}", headers=bearer, trust_env=False)
                problem(response, 401, wire.Code.UNAUTHORIZED)
                assert response.headers["www-authenticate"] == "Bearer"
        basic = {"authorization": f"Basic {TOKENS[0]}"}
        assert httpx.get(f"{server.url}/v1/envs", headers=basic, trust_env=False).status_code == 401

        one, other = Session(server.url, token=TOKENS[0]), Session(server.url, token=TOKENS[1])
        assert (one.opened.status_code, other.opened.status_code) == (201, 201)
        second = Session(server.url, token=TOKENS[0])
        assert "its 1 sessions" in problem(second.opened, 429, wire.Code.FULL)
        assert int(second.opened.headers["retry-after"]) > 0
        other.name = one.name  # another client's session is as good as none
        problem(other.close(), 404, wire.Code.UNKNOWN_SESSION)


def test_without_a_token_only_this_machine_is_served(server: BackgroundServer) -> None:
    with pytest.raises(UsageError, match="a token is needed"):
        Settings(host="0.0.0.0")
    with pytest.raises(UsageError, match="at least 16"):
        Settings(tokens=("short",))
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", ""):
        response = httpx.get(f"{server.url}/v1/envs", headers={"host": host}, trust_env=False)
        problem(response, 403, wire.Code.FORBIDDEN)
    for host in ("localhost:1", "127.0.0.1", "[::1]:8321"):
        assert httpx.get(f"{server.url}/v1/envs", headers={"host": host}, trust_env=False).status_code == 200


def test_a_full_server_says_when_to_come_back_and_has_room_again() -> None:
    with serving(max_sessions=2) as server:
        held = [Session(server.url) for _ in range(2)]
        late = Session(server.url)
        assert "2 sessions" in problem(late.opened, 503, wire.Code.FULL)
        assert int(late.opened.headers["retry-after"]) > 0
        held[0].close()
        assert until(lambda: late.open().status_code == 201)
        assert metric(server.url, "refused_full_total") >= 1


def test_as_many_pools_as_allowed_and_the_unused_one_makes_room() -> None:
    with serving(max_pools=1) as server:
        session = Session(server.url)
        problem(Session(server.url, FORGETFUL).opened, 503, wire.Code.FULL)
        session.close()
        assert until(lambda: Session(server.url, FORGETFUL).opened.status_code == 201)
        assert httpx.get(f"{server.url}/health", trust_env=False).json()["pools"] == 1


def test_a_session_whose_processes_start_slowly_is_not_idle() -> None:
    with serving(idle_seconds=0.3) as server:  # less than a process needs to start
        assert Session(server.url).play("reset", options={"task": "a"})["observation"].startswith("a 0 ")


def test_idle_sessions_and_pools_end_and_busy_ones_do_not() -> None:
    with serving(idle_seconds=0.6) as server:
        idle, busy = Session(server.url), Session(server.url)
        busy.play("reset", options={"task": "a"})
        assert busy.play("step", action="sleep 1.5")["observation"].startswith("a 1 ")
        problem(idle.post("reset"), 404, wire.Code.UNKNOWN_SESSION)
        assert sessions(server.url) == 1
        assert until(lambda: httpx.get(f"{server.url}/health", trust_env=False).json()["pools"] == 0)
        assert (sessions(server.url), metric(server.url, "sessions_expired_total")) == (0, 2)


def test_clients_that_vanish_in_the_middle_of_a_request_leave_nothing() -> None:
    with serving(idle_seconds=0.6, body_seconds=0.5) as server:
        host, port = server.url.removeprefix("http://").split(":")
        session = Session(server.url)
        session.play("reset", options={"task": "a"})
        head = f"POST /v1/sessions/{session.name}/step?number=2 HTTP/1.1\r\nHost: {host}\r\n"
        half = [
            b"PO",
            f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode(),
            f"{head}Content-Type: application/json\r\nContent-Length: 23\r\n\r\n".encode() + b'{"action": "sleep 0.2"}',
        ]
        sockets = [socket.create_connection((host, int(port))) for _ in half for _ in range(3)]
        for number, connection in enumerate(sockets):
            connection.sendall(half[number // 3])
        stalled = sockets[3]
        stalled.settimeout(10)
        assert b" 408 " in stalled.recv(1 << 16).partition(b"\r\n")[0]
        for connection in sockets[6:]:
            connection.close()  # gone before the answer
        assert until(lambda: sessions(server.url) == 0)
        for connection in sockets:
            connection.close()


def test_a_dead_process_costs_its_episodes_and_nothing_else(server: BackgroundServer) -> None:
    held = [Session(server.url) for _ in range(2)]
    pids = [session.play("reset", seed=3, options={"task": "a"})["info"]["pid"] for session in held]
    assert pids[0] != pids[1]
    detail = problem(held[0].post("step", action="segv"), 500, wire.Code.LOST)
    assert "SIGSEGV" in detail and str(pids[0]) in detail
    assert held[1].play("step", action="look")["observation"].startswith("a 1 ")
    problem(held[0].post("step", action="look"), 409, wire.Code.RESET_NEEDED)
    assert held[0].play("reset", seed=3, options={"task": "b"})["info"]["pid"] not in pids
    os.kill(pids[1], signal.SIGKILL)  # while it is idle
    assert "SIGKILL" in problem(held[1].post("step", action="look"), 500, wire.Code.LOST)
    for session in held:
        session.close()


def test_a_world_that_raises_fails_its_episode_and_its_process_lives(server: BackgroundServer) -> None:
    session = Session(server.url)
    pid = session.play("reset", options={"task": "a"})["info"]["pid"]
    assert "that was too much" in problem(session.post("step", action="raise"), 500, wire.Code.FAILED)
    problem(session.post("step", action="look"), 409, wire.Code.RESET_NEEDED)
    assert session.play("reset", options={"task": "a"})["info"]["pid"] == pid
    assert "cannot be sent" in problem(session.post("step", action="lambda"), 500, wire.Code.FAILED)
    session.close()


def test_a_hung_world_is_ended() -> None:
    with serving(step_seconds=1.0) as server:
        session = Session(server.url)
        session.play("reset", options={"task": "a"})
        assert "no answer for 1 s" in problem(session.post("step", action="hang"), 500, wire.Code.LOST)
        assert session.play("reset", options={"task": "b"})["observation"].startswith("b 0 ")


def test_a_world_that_cannot_be_made_tells_why_and_takes_no_room(server: BackgroundServer) -> None:
    before = sessions(server.url)
    session = Session(server.url)
    session.close()
    assert "TooMuchError" in problem(session.open(fault="raise"), 500, wire.Code.FAILED)
    problem(session.open(fault="exit"), 500, wire.Code.LOST)
    assert sessions(server.url) == before


def test_snapshots_go_on_elsewhere_and_only_those_that_the_server_signed(server: BackgroundServer) -> None:
    session, other = Session(server.url), Session(server.url)
    session.play("reset", seed=5, options={"task": "a"})
    session.play("step", action="look")
    sealed = session.post("snapshot").content
    then = session.play("step", action="look")["observation"]
    here = wire.decode(other.post("restore", raw=sealed).content, wire.JSON)
    assert here["observation"].startswith("a 1 ")
    assert other.play("step", action="look")["observation"] == then

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(HERE / "exploded"),)

    bomb = pickle.dumps(Bomb())
    for forged in (bomb, bytes(32) + bomb, sealed[:32] + bomb, sealed[:-1], b"", sealed[1:], sealed + b"x"):
        problem(other.post("restore", raw=forged), 422, wire.Code.FOREIGN_SNAPSHOT)
    assert not (HERE / "exploded").exists()
    assert other.play("step", action="look")["observation"].startswith("a 3 ")
    forgetful = Session(server.url, FORGETFUL)
    problem(forgetful.post("restore", raw=sealed), 422, wire.Code.FOREIGN_SNAPSHOT)
    forgetful.play("reset", options={"task": "a"})
    assert "cannot be forked" in problem(forgetful.post("snapshot"), 422, wire.Code.USAGE)
    for each in (session, other, forgetful):
        each.close()


def test_a_fork_goes_on_by_itself(server: BackgroundServer) -> None:
    session = Session(server.url)
    session.play("reset", seed=5, options={"task": "a"})
    twin = Session(server.url)
    twin.close()
    reply = session.post("fork", 7, raw=twin.name.encode())
    assert reply.status_code == 200, reply.text
    assert session.post("fork", 7, raw=twin.name.encode()).content == reply.content
    expected = session.play("step", action="look")["observation"]
    assert twin.play("step", action="look")["observation"] == expected
    twin.play("step", action="end")
    assert session.play("step", action="look")["observation"].startswith("a 2 ")
    problem(session.post("fork", raw=twin.name.encode()), 409, wire.Code.EXISTS)
    assert session.client.get(f"/v1/sessions/{session.name}").json()["busy"] is False
    problem(session.post("fork", raw=b"short"), 422, wire.Code.USAGE)
    for each in (session, twin):
        assert each.close().status_code == 204


def test_an_episode_is_replayed_only_as_it_was(server: BackgroundServer) -> None:
    session = Session(server.url)
    reply = session.play("reset", seed=2, options={"task": "a"})
    digest = wire.link(b"", reply["observation"], 0.0, False, False)
    reply = session.play("step", action="look")
    digest = wire.link(digest, reply["observation"], reply["reward"], False, False)
    body = {"seed": 2, "options": {"task": "a"}, "actions": ["look"], "digest": digest.hex()}
    assert session.play("replay", **body)["observation"] == reply["observation"]
    other = problem(session.post("replay", **{**body, "seed": 3}), 500, wire.Code.FAILED)
    assert "did not play again" in other
    session.close()


def test_environments_and_tasks_are_listed_without_a_session(server: BackgroundServer) -> None:
    before = sessions(server.url)
    client = httpx.Client(base_url=server.url, trust_env=False, timeout=30)
    assert client.get("/v1/envs").json() == {"envs": [OBEDIENT, FORGETFUL]}
    listed = client.get(f"/v1/envs/{OBEDIENT}/tasks", params={"split": "train"}).json()
    assert listed == {"env_id": OBEDIENT, "split": "train", "tasks": ["a", "b", "c"]}
    problem(client.get(f"/v1/envs/{FORGETFUL}/tasks"), 422, wire.Code.USAGE)
    problem(client.get("/v1/envs/nothing/tasks"), 422, wire.Code.USAGE)
    problem(client.get(f"/v1/envs/{OBEDIENT}/tasks", params={"arguments": "{"}), 422, wire.Code.USAGE)
    assert sessions(server.url) == before


def test_a_session_starts_with_nothing_of_the_last_one_in_its_slot() -> None:
    with serving(max_sessions=1) as server:
        first = Session(server.url)
        pid = first.play("reset", seed=1, options={"task": "a"})["info"]["pid"]
        first.close()
        second = Session(server.url)
        assert until(lambda: second.open().status_code in (200, 201))
        problem(second.post("step", action="look"), 409, wire.Code.RESET_NEEDED)
        second.close()
        assert until(lambda: sessions(server.url) == 0)
        os.kill(pid, signal.SIGKILL)
        third = Session(server.url)
        assert until(lambda: third.open().status_code in (200, 201))
        assert third.play("reset", options={"task": "a"})["info"]["pid"] != pid
