"""The retrieval server and its client, over real sockets."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")
pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import httpx

from agentropy.envs.search.env import SearchEnv
from agentropy.envs.search.http import HttpEncoder, HttpRetriever, RetrieverAnswerError, RetrieverUnavailableError
from agentropy.envs.search.retriever import Hit, open_retriever
from agentropy.envs.search.server import add_arguments, main, serve_retriever
from agentropy.envs.search.sources import Generated
from agentropy.errors import EnvironmentFailedError, UsageError

TOKEN = "correct horse"
COMMAND = (
    "import argparse; from agentropy.envs.search.server import add_arguments, main\n"
    "parser = argparse.ArgumentParser(); add_arguments(parser); raise SystemExit(main(parser.parse_args()))"
)


@contextmanager
def served(*arguments: str, **environment: str) -> Iterator[str]:
    """Run the command on a free port; give its URL."""
    command = [sys.executable, "-c", COMMAND, "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.startswith("retriever at http://127.0.0.1:"), line + process.stderr.read()
            yield line.split()[-1]
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    limits = ["--max-queries", "5", "--max-topk", "20"]
    with served("--split", "valid", *limits, AGENTROPY_RETRIEVER_TOKEN=TOKEN) as address:
        yield address


@pytest.fixture(scope="module")
def client(url) -> Iterator[HttpRetriever]:
    retriever = HttpRetriever(url, token=TOKEN)
    yield retriever
    retriever.close()


def post(url: str, body: object, token: str = TOKEN) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(url, content=content, headers={"Authorization": f"Bearer {token}"})


def test_a_search_over_http_is_one_in_the_process(client):
    local = open_retriever("bm25", lambda: Generated().corpus("valid"))
    queries = [question.text for question in Generated().questions("valid").values()][:5]
    for k in (1, 3, 20):
        assert client.search(queries, k) == local.search(queries, k)
    assert client.search([], 3) == [] and client.search(["zzz"], 3) == [[]]


def test_the_client_survives_pickling(client):
    assert pickle.loads(pickle.dumps(client)).search(["Theatre"], 2) == client.search(["Theatre"], 2)


def test_the_answer_has_search_r1s_form(url):
    scored = post(url, {"queries": ["Theatre"], "topk": 2, "return_scores": True}).json()
    assert set(scored) == {"result"} and len(scored["result"]) == 1 and len(scored["result"][0]) == 2
    first = scored["result"][0][0]
    assert set(first) == {"document", "score"} and set(first["document"]) == {"id", "contents"}
    title, _, text = first["document"]["contents"].partition("\n")
    assert title[0] == title[-1] == '"' and title.strip('"') in text
    plain = post(url, {"queries": ["Theatre"]}).json()
    assert plain["result"][0][:2] == [row["document"] for row in scored["result"][0]]
    assert len(plain["result"][0]) == 3


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"queries": ["a"] * 6}, 413, "at most 5 queries"),
        ({"queries": ["a"], "topk": 21}, 422, "topk can be at most 20"),
        ({"queries": ["a"], "topk": 0}, 422, "topk"),
        ({"queries": ["a"], "topk": "3"}, 422, "topk"),
        ({"queries": []}, 422, "queries"),
        ({"queries": "a"}, 422, "queries"),
        ({"queries": [1]}, 422, "queries.0"),
        ({"queries": ["a" * 5000]}, 422, "at most 4096 characters"),
        ({}, 422, "queries: Field required"),
        (b"{", 422, "Invalid JSON"),
        (b"[" * 100_000, 422, ""),
        (b" " * 1_000_000, 413, "longer than"),
    ],
)
def test_wrong_requests_are_refused_with_the_reason(url, body, status, message):
    response = post(url, body)
    assert response.status_code == status and message in response.json()["detail"]


@pytest.mark.parametrize("token", ["", "wrong", "correct hors", "correct horse "])
def test_without_the_token_nothing_is_found(url, token):
    response = httpx.post(url, json={"queries": ["a"]}, headers={"Authorization": f"Bearer {token}x"})
    assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
    with pytest.raises(RetrieverAnswerError, match=r"status 401.*set AGENTROPY_RETRIEVER_TOKEN"):
        HttpRetriever(url, token=token + "x").search(["a"], 1)


def test_the_server_says_that_it_is_there(url):
    response = httpx.get(url.replace("/retrieve", "/health"))
    assert response.status_code == 200 and response.json() == {"status": "ok"}


def test_the_environment_plays_over_http_as_in_the_process(url, monkeypatch):
    monkeypatch.setenv("AGENTROPY_RETRIEVER_TOKEN", TOKEN)
    episodes = []
    for retriever in ("bm25", url):
        env = SearchEnv("valid", retriever=retriever)
        seen = [env.reset(seed=3)]
        seen.append(env.step(f"<search>{'Theatre é ' * 10_000}</search>"))
        seen += [env.step(action) for action in env.expert()]
        assert seen[-1][-1]["won"]
        env.close()
        env.close()
        episodes.append(seen)
    assert episodes[0] == episodes[1]


class Scripted(ThreadingHTTPServer):
    """A server that answers each request with the next of some statuses and bodies."""

    def __init__(self, *answers: tuple[int, object]) -> None:
        self.answers, self.bodies = list(answers), []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                self.bodies.append(json.loads(handler.rfile.read(int(handler.headers["Content-Length"]))))
                status, body = self.answers.pop(0)
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content)

            def log_message(handler, *arguments):
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


FOUND = {"result": [[{"document": {"id": "1", "contents": '"Calden"\nA city.'}, "score": 2.5}]]}


def test_an_overloaded_server_is_asked_again():
    with Scripted((503, {}), (502, b"bad gateway"), (429, {}), (200, FOUND)) as server:
        retriever = HttpRetriever(server.url, pause=0.001)
        (hits,) = retriever.search(["Calden"], 3)
        retriever.close()
    assert [(hit.passage.title, hit.passage.text, hit.score) for hit in hits] == [("Calden", "A city.", 2.5)]
    assert server.bodies == [{"queries": ["Calden"], "topk": 3, "return_scores": True}] * 4


def test_a_server_that_stays_overloaded_is_given_up():
    with Scripted(*[(503, {})] * 3) as server:
        retriever = HttpRetriever(server.url, attempts=3, pause=0.001)
        with pytest.raises(RetrieverUnavailableError, match="no answer in 3 attempts; the last: status 503"):
            retriever.search(["Calden"], 3)
        retriever.close()
    assert not server.answers


def test_a_server_that_is_not_there_is_a_failure_of_the_environment():
    with Scripted() as server:
        gone = server.url
    env = SearchEnv(retriever=HttpRetriever(gone, attempts=2, pause=0.001))
    env.reset(seed=0)
    with pytest.raises(EnvironmentFailedError, match="no answer in 2 attempts; the last: ConnectError"):
        env.step("<search>x</search>")


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (400, {"detail": "no"}, "status 400"),
        (200, b"<html>", "no JSON"),
        (200, {"result": []}, "0 results for 1 queries"),
        (200, {"other": 1}, "expected form"),
        (200, {"result": [[{"document": {}}]]}, "expected form"),
        (200, [1], "expected form"),
        (200, {"result": [[1]]}, "expected form"),
    ],
)
def test_answers_that_are_none_are_refused(status, answer, message):
    with Scripted((status, answer)) as server:
        retriever = HttpRetriever(server.url, pause=0.001)
        with pytest.raises(RetrieverAnswerError, match=message):
            retriever.search(["Calden"], 3)
        retriever.close()


def test_servers_that_send_documents_without_scores_are_read():
    bare = {"result": [[{"id": 4, "contents": '"Calden"\nA city.'}, {"id": 5, "title": "Ister", "text": "A river."}]]}
    with Scripted((200, bare)) as server:
        retriever = HttpRetriever(server.url)
        (hits,) = retriever.search(["Calden"], 1)
        retriever.close()
    assert len(hits) == 1 and isinstance(hits[0], Hit) and hits[0].passage.id == "4"


def test_embeddings_come_from_a_server_with_openais_protocol():
    answer = {"data": [{"index": 1, "embedding": [0, 2]}, {"index": 0, "embedding": [1, 0]}]}
    with Scripted((200, answer), (200, answer)) as server:
        encoder = HttpEncoder(f"{server.url}/v1/embeddings#small")
        assert encoder.encode(["a", "b"], query=True).tolist() == [[1, 0], [0, 2]]
        with pytest.raises(RetrieverAnswerError, match="for 3 texts"):
            encoder.encode(["a", "b", "c"], query=False)
    assert server.bodies[0] == {"model": "small", "input": ["a", "b"]}
    assert encoder.name.endswith("#small")


def test_more_requests_at_once_than_allowed_are_turned_away():
    from fastapi.testclient import TestClient

    from agentropy.envs.search.app import make_app

    inside, leave = threading.Event(), threading.Event()

    class Slow:
        def search(self, queries, k):
            inside.set()
            assert leave.wait(30)
            return [[] for _ in queries]

        def close(self):
            pass

    app = make_app(Slow(), token=None, max_queries=4, max_topk=4, concurrency=1)
    with TestClient(app) as http:
        first: list[int] = []
        thread = threading.Thread(
            target=lambda: first.append(http.post("/retrieve", json={"queries": ["a"]}).status_code)
        )
        thread.start()
        assert inside.wait(30)
        refused = http.post("/retrieve", json={"queries": ["b"]})
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        leave.set()
        thread.join()
        assert first == [200]
        assert http.post("/retrieve", json={"queries": ["c"]}).status_code == 200


def test_an_open_address_needs_a_token(monkeypatch):
    monkeypatch.delenv("AGENTROPY_RETRIEVER_TOKEN", raising=False)
    retriever = open_retriever("bm25", lambda: Generated().corpus("valid"))
    with pytest.raises(UsageError, match=r"0\.0\.0\.0 can be reached from other machines: give --token"):
        serve_retriever(retriever, host="0.0.0.0", port=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retriever", "bm52"], "did you mean 'bm25'"),
        (["--passages", "/nowhere/p.jsonl"], "there is no file"),
        (["--split", "trian"], "unknown split 'trian'"),
        (["--source", "shard"], "did you mean 'shared'"),
        (["--host", "203.0.113.7", "--token", "x"], "cannot listen on 203.0.113.7 port"),
    ],
)
def test_wrong_options_are_named(arguments, message):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(UsageError, match=message):
        main(parser.parse_args([*arguments, "--port", "0"]))


def test_the_module_of_the_command_loads_nothing_heavy():
    code = (
        "import sys, agentropy.envs.search.server; "
        "print(sorted({'fastapi', 'uvicorn', 'numpy', 'bm25s', 'httpx', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before = subprocess.run(
        [sys.executable, "-c", code.replace(".search.server", "")], capture_output=True, text=True, check=True
    )
    assert done.stdout == before.stdout and "fastapi" not in done.stdout and "bm25s" not in done.stdout
