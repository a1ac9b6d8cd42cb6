"""Claims about ``RemoteEnv``: it gives the episodes that the environment itself would, whatever happens on the way."""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("msgpack")

import httpx

from agentropy.envs.pool import EnvPool
from agentropy.envs.remote import RemoteEnv, RemoteSnapshot
from agentropy.envs.serve.running import BackgroundServer
from agentropy.envs.serve.settings import Settings
from agentropy.errors import EnvironmentFailedError, UsageError

HERE = Path(__file__).parent
OBEDIENT, FORGETFUL, ALFWORLD = "pool_worlds:Obedient-v0", "pool_worlds:Forgetful-v0", "agentropy/ALFWorld-v0"
NEXT_STEP = {"autoreset_mode": AutoresetMode.NEXT_STEP}
FEW = {"num_games": {"train": 20, "valid_seen": 5, "valid_unseen": 5}}


@pytest.fixture(scope="module", autouse=True)
def worlds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        patch.delenv("AGENTROPY_TOKEN", raising=False)
        patch.delenv("AGENTROPY_REMOTE_URL", raising=False)
        yield


def serve(**settings: Any) -> BackgroundServer:
    defaults: dict[str, Any] = {"port": 0, "workers": 1, "max_sessions": 16}
    return BackgroundServer(Settings(**(defaults | {"env_ids": (OBEDIENT, FORGETFUL, ALFWORLD)} | settings)))


@pytest.fixture(scope="module")
def server() -> Iterator[BackgroundServer]:
    with serve(workers=2, max_sessions=48) as server:
        yield server


@pytest.fixture
def make(server: BackgroundServer) -> Iterator[Any]:
    """Make clients; afterwards they are closed, and the server has none of their sessions."""
    made = []

    def make(env_id: str = OBEDIENT, url: str = server.url, **options: Any) -> RemoteEnv:
        env = gym.make("agentropy/Remote-v0", url=url, env_id=env_id, timeout=30.0, **options).unwrapped
        made.append(env)
        return env

    yield make
    for env in made:
        env.close()
        env.close()
    gc.collect()
    assert until(lambda: sessions(server.url) == 0), "sessions were leaked"


def sessions(url: str) -> int:
    return httpx.get(f"{url}/health", trust_env=False).json()["sessions"]


def until(happened: Any, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(done)


def without_pid(moment: tuple[Any, ...]) -> tuple[Any, ...]:
    return *moment[:-1], {name: value for name, value in moment[-1].items() if name != "pid"}


def play(env: Any, seed: int | None, actions: list[str], options: dict[str, Any] | None = None) -> list[Any]:
    moments = [env.reset(seed=seed, options=options)]
    return [without_pid(moment) for moment in [*moments, *(env.step(action) for action in actions)]]


@pytest.mark.parametrize("message_format", ["msgpack", "json"])
def test_alfworld_plays_the_same_here_and_there(make: Any, message_format: str) -> None:
    pytest.importorskip("alfworld")
    remote = make(ALFWORLD, message_format=message_format, expert_info=True, **FEW)
    local = gym.make(ALFWORLD, expert_info=True, **FEW).unwrapped
    assert remote.tasks() == local.tasks() and remote.tasks_hash("valid_seen") == local.tasks_hash("valid_seen")
    assert remote.observation_space == local.observation_space and remote.action_space == local.action_space
    for name in ("splits", "split", "max_turns", "has_expert", "instructions"):
        assert getattr(remote, name) == getattr(local, name)
    assert remote.lexicon() == local.lexicon() and remote.corpus(tasks=2) == local.corpus(tasks=2)
    for seed in (11, None, None):
        moment = remote.reset(seed=seed)
        assert moment == local.reset(seed=seed)
        assert remote.np_random_seed == local.np_random_seed
        assert remote.admissible() == local.admissible()
        for number, action in enumerate(local.expert()):
            assert next(remote.expert()) == action
            odd = "\ud800 dance" if number == 1 else action
            moment = remote.step(odd)
            assert moment == local.step(odd)
        assert moment[2] and moment[-1]["won"]
        with pytest.raises(ResetNeeded):
            remote.step("look")
        assert list(remote.expert()) == []
    with pytest.raises(UsageError, match="unknown ALFWorld task"):
        remote.reset(options={"task": "nothing"})
    with pytest.raises(UsageError, match="did you mean 'valid_seen'"):
        remote.tasks("valid_sen")


def test_the_generator_goes_on_as_it_would_here(make: Any) -> None:
    remote, local = make(), gym.make(OBEDIENT).unwrapped
    for seed in (3, None, None, 4, None):  # Obedient-v0 draws in every step, too
        assert play(remote, seed, ["look", "wait"]) == play(local, seed, ["look", "wait"])
        assert remote.np_random.bit_generator.state == local.np_random.bit_generator.state


def test_without_a_seed_episodes_differ(make: Any) -> None:
    assert make().reset()[0] != make().reset()[0]


def test_gymnasiums_checker_has_no_complaint(make: Any) -> None:
    pytest.importorskip("alfworld")
    check_env(make(ALFWORLD, **FEW))
    check_env(make(ALFWORLD, render_mode="ansi", **FEW))


def test_rendering_is_done_here(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    env = make(render_mode="ansi")
    observation, _ = env.reset(seed=1)
    assert env.render() == observation
    human = make(render_mode="human")
    human.reset(seed=1)
    human.step("look")
    assert capsys.readouterr().out.splitlines()[1] == "> look"


def test_snapshots_go_on_in_another_client(make: Any) -> None:
    env, other = make(), make()
    env.reset(seed=3, options={"task": "a"})
    at = env.step("look")
    snapshot = pickle.loads(pickle.dumps(env.snapshot()))
    then = [env.step("wait")[0], env.step("wait")[0]]
    for restored in (other, env):
        observation, _ = restored.restore(snapshot)
        assert observation == at[0]
        assert [restored.step("wait")[0], restored.step("wait")[0]] == then
    twin = env.fork()
    assert twin.step("look")[0] == env.step("look")[0]
    twin.close()
    with pytest.raises(UsageError, match="not a str"):
        env.restore("snapshot")
    with pytest.raises(UsageError, match="the snapshot is of"):
        make(FORGETFUL).restore(snapshot)


def test_a_world_without_snapshots_or_expert_says_so(make: Any) -> None:
    env = make(FORGETFUL)
    with pytest.raises(ResetNeeded):
        env.snapshot()
    env.reset(seed=1, options={"task": "a"})
    for call in (env.snapshot, env.fork, env.tasks, env.admissible, lambda: next(env.expert())):
        with pytest.raises(UsageError, match="Forgetful-v0"):
            call()
    assert not hasattr(env, "lexicon") and not hasattr(env, "splits")
    assert env.step("look")[0].startswith("a 1 ")


@pytest.mark.parametrize("env_id", [OBEDIENT, FORGETFUL])
def test_a_pickled_or_copied_client_goes_on_where_it_was(make: Any, env_id: str) -> None:
    env = make(env_id)
    env.reset(seed=3, options={"task": "a"})
    env.step("look")
    pickled = pickle.dumps(env)
    twins = [pickle.loads(pickled), copy.deepcopy(env)]
    expected = [env.step("look")[0], env.reset()[0]]
    for twin in twins:
        assert [twin.step("look")[0], twin.reset()[0]] == expected
        twin.close()
    fresh = pickle.loads(pickle.dumps(make(env_id)))
    with pytest.raises(ResetNeeded):
        fresh.step("look")
    fresh.close()


def test_a_pickled_client_goes_on_in_a_process_that_never_saw_the_server(make: Any) -> None:
    env = make()
    env.reset(seed=3, options={"task": "a"})
    env.step("look")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_step, (env,)) == env.step("look")[0]


def _step(env: RemoteEnv) -> str:
    observation = env.step("look")[0]
    env.close()
    return observation


def test_parent_and_fork_go_on_each_by_itself(make: Any) -> None:
    env = make()
    env.reset(seed=3, options={"task": "a"})
    env.step("look")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover
        try:
            os.write(writer, env.step("look")[0].encode())
            env.close()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reader, 1000).decode() == env.step("look")[0]
    assert env.step("look")[0].startswith("a 3 ")
    os.close(reader)
    os.close(writer)


def test_a_forgotten_client_gives_its_session_back(make: Any, server: BackgroundServer) -> None:
    keeper, forgotten = make(), gym.make("agentropy/Remote-v0", url=server.url, env_id=OBEDIENT)
    forgotten.reset(seed=1)
    assert sessions(server.url) == 2
    del forgotten
    gc.collect()
    keeper.reset(seed=1)
    assert until(lambda: sessions(server.url) == 1)


def test_errors_are_raised_here_as_they_were_there(make: Any) -> None:
    env = make()
    with pytest.raises(ResetNeeded):
        env.step("look")
    env.reset(options={"task": "a"})
    with pytest.raises(UsageError, match="an action is a text"):
        env.step(3)
    with pytest.raises(EnvironmentFailedError, match="that was too much"):
        env.step("raise")
    with pytest.raises(ResetNeeded):
        env.step("look")
    env.reset(options={"task": "a"})
    with pytest.raises(EnvironmentFailedError, match=r"SIGSEGV.*recover=True"):
        env.step("segv")
    with pytest.raises(ResetNeeded):
        env.step("look")
    assert env.reset(options={"task": "b"})[0].startswith("b 0 ")
    with pytest.raises(UsageError, match="no environment 'nothing'"):
        make("nothing").reset()
    with pytest.raises(UsageError, match="may not set 'data'"):
        make(ALFWORLD, data="/etc")
    with pytest.raises(UsageError, match="unknown ALFWorld split"):
        make(ALFWORLD, split="nothing")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({}, "AGENTROPY_REMOTE_URL"),
        ({"url": "localhost:80"}, "is like http://"),
        ({"url": "ftp://x"}, "is like http://"),
        ({"url": "http://x", "timeout": 0}, "timeout"),
        ({"url": "http://x", "message_format": "xml"}, "message format"),
        ({"url": "http://x", "render_mode": "rgb"}, "render mode"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        RemoteEnv(**options).reset()


def test_url_and_token_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    token = "a-token-of-enough-characters"
    with serve(tokens=(token,)) as server:
        monkeypatch.setenv("AGENTROPY_REMOTE_URL", server.url)
        with pytest.raises(UsageError, match="AGENTROPY_TOKEN"):
            gym.make("agentropy/Remote-v0", env_id=OBEDIENT)
        monkeypatch.setenv("AGENTROPY_TOKEN", token)
        env = gym.make("agentropy/Remote-v0", env_id=OBEDIENT)
        assert env.reset(options={"task": "a"})[0].startswith("a 0 ")
        assert token.encode() not in pickle.dumps(env.unwrapped)
        env.close()


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(EnvironmentFailedError, match=f"{url} gave no answer in 0.3 seconds: ConnectError"):
            RemoteEnv(url, OBEDIENT, timeout=0.3).reset()


def test_a_full_server_is_waited_for() -> None:
    with serve(max_sessions=1) as server:
        first = RemoteEnv(server.url, OBEDIENT)
        first.reset()
        with pytest.raises(EnvironmentFailedError, match="1 sessions already"):
            RemoteEnv(server.url, OBEDIENT, timeout=0.3).reset()
        threading.Timer(0.3, first.close).start()
        second = RemoteEnv(server.url, OBEDIENT, timeout=30)
        assert second.reset(options={"task": "a"})[0].startswith("a 0 ")
        second.close()


class LossyProxy:
    """Passes requests on, and loses the answers (or the requests) whose number is in ``lose``."""

    def __init__(self, url: str, lose_answers: set[int], lose_requests: set[int]) -> None:
        self._target = url.removeprefix("http://").split(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._lose_answers, self._lose_requests, self.requests = lose_answers, lose_requests, 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection((self._target[0], int(self._target[1]))) as server:
            while request := self._message(client):
                self.requests += 1
                if self.requests in self._lose_requests:
                    return
                server.sendall(request)
                answer = self._message(server)
                if self.requests in self._lose_answers:
                    return
                client.sendall(answer)

    @staticmethod
    def _message(source: socket.socket) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            if not (part := source.recv(1 << 16)):
                return b""
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
        while len(body) < (int(lengths[0]) if lengths else 0):
            body += source.recv(1 << 16)
        return head + b"\r\n\r\n" + body

    def close(self) -> None:
        self._listener.close()


def test_lost_answers_and_requests_double_and_skip_nothing(make: Any, server: BackgroundServer) -> None:
    proxy = LossyProxy(server.url, lose_answers={1, 4, 7, 8, 14}, lose_requests={2, 10, 11, 15})
    actions = ["look", "wait", "look", "look", "wait", "look"]
    env = make(url=proxy.url)
    assert play(env, 5, actions) == play(gym.make(OBEDIENT).unwrapped, 5, actions)
    assert proxy.requests == 2 + len(actions) + 9
    env.close()
    proxy.close()


def test_between_episodes_a_session_may_end_unnoticed() -> None:
    local = gym.make(OBEDIENT).unwrapped
    with serve(idle_seconds=0.3) as server:
        env = RemoteEnv(server.url, OBEDIENT)
        for seed in (3, None):
            assert play(env, seed, ["look"]) == play(local, seed, ["look"])
            assert until(lambda: sessions(server.url) == 0)
        with pytest.raises(EnvironmentFailedError, match=r"nobody used it for 0\.3 seconds.*recover=True"):
            env.step("look")
        with pytest.raises(ResetNeeded):
            env.step("look")
        env.close()


def test_with_recover_an_expired_session_or_dead_process_changes_nothing() -> None:
    actions = ["look", "wait", "look"]
    *expected, (last, *_) = play(gym.make(OBEDIENT).unwrapped, 3, [*actions, "wait"])
    with serve(idle_seconds=0.4) as server:
        env = RemoteEnv(server.url, OBEDIENT, recover=True)
        seen = [env.reset(seed=3)]
        assert until(lambda: sessions(server.url) == 0)
        seen.append(env.step(actions[0]))
        os.kill(seen[-1][-1]["pid"], signal.SIGKILL)
        seen.append(env.step(actions[1]))
        snapshot = env.snapshot()
        assert until(lambda: sessions(server.url) == 0)
        seen.append(env.step(actions[2]))
        assert [without_pid(moment) for moment in seen] == expected
        for _ in range(2):
            assert env.restore(snapshot)[0] == seen[2][0]
            moment = env.step(actions[2])
            os.kill(moment[-1]["pid"], signal.SIGKILL)
            assert env.step("wait")[0] == last
        assert env.recoveries == 5
        env.close()


def test_an_action_that_always_kills_is_given_up() -> None:
    with serve() as server:
        env = RemoteEnv(server.url, OBEDIENT, recover=True)
        env.reset(seed=3)
        env.step("look")
        with pytest.raises(EnvironmentFailedError, match=r"lost 3 times in a row.*SIGSEGV"):
            env.step("segv")
        assert env.reset(options={"task": "a"})[0].startswith("a 0 ")
        env.close()


def test_a_server_that_is_started_again() -> None:
    first = serve()
    port = int(first.url.rpartition(":")[2])
    plain, steady = RemoteEnv(first.url, OBEDIENT), RemoteEnv(first.url, OBEDIENT, recover=True)
    local = gym.make(OBEDIENT).unwrapped
    local.reset(seed=3)
    for env in (plain, steady):
        env.reset(seed=3)
    snapshot = steady.snapshot()
    assert without_pid(steady.step("look")) == without_pid(local.step("look"))
    first.close()
    again: list[BackgroundServer] = []
    timer = threading.Timer(0.5, lambda: again.append(serve(port=port)))
    timer.start()
    try:
        assert without_pid(steady.step("wait")) == without_pid(local.step("wait"))
        with pytest.raises(EnvironmentFailedError, match="started again"):
            plain.step("look")
        assert plain.reset(seed=3)[0] == gym.make(OBEDIENT).reset(seed=3)[0]
        plain.restore(snapshot)  # signed by the first server, so it is played again
        local.reset(seed=3)
        assert without_pid(plain.step("look")) == without_pid(local.step("look"))
        plain.close()
        steady.close()
    finally:
        timer.join()
        again[0].close()


def test_an_episode_that_does_not_play_again_is_not_passed_off_as_the_same() -> None:
    with serve() as server:
        env = RemoteEnv(server.url, OBEDIENT, recover=True)
        env.reset(seed=3)
        pid = env.step("look")[-1]["pid"]
        assert env._episode is not None
        env._episode.digest = b"another"  # as if the world had shown something else
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFailedError, match="did not play again"):
            env.step("look")
        env.close()


def test_a_snapshot_that_another_server_signed_is_played_again_and_draws_nothing(make: Any) -> None:
    pytest.importorskip("alfworld")
    remote, local = make(ALFWORLD, **FEW), gym.make(ALFWORLD, **FEW).unwrapped
    for env in (remote, local):
        env.reset(seed=4)
        env.step("look")
    foreign, point = replace(remote.snapshot(), sealed=b"x" * 99), local.snapshot()
    for env in (remote, local):
        env.reset()
    assert remote.restore(foreign) == local.restore(point)
    assert remote.step("inventory") == local.step("inventory")
    assert remote.np_random.bit_generator.state == local.np_random.bit_generator.state
    assert remote.reset() == local.reset()


def test_forged_snapshots_of_a_client_are_never_unpickled(make: Any) -> None:
    env = make()
    env.reset(seed=3, options={"task": "a"})
    point = env.snapshot()
    forged = RemoteSnapshot(point.env_id, b"x" * 99, point.start, ("look",), b"no", "")
    with pytest.raises(EnvironmentFailedError, match="did not play again"):
        env.restore(forged)


def test_many_threads_each_with_its_own_client(make: Any) -> None:
    actions = ["look"] * 12
    expected = [play(gym.make(OBEDIENT).unwrapped, seed, actions) for seed in range(12)]
    seen: dict[int, list[Any]] = {}
    envs = [make() for _ in range(12)]

    def run(seed: int) -> None:
        seen[seed] = play(envs[seed], seed, actions)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [seen[seed] for seed in range(12)] == expected


def test_a_pool_of_clients_plays_what_one_environment_plays(server: BackgroundServer) -> None:
    kwargs = {"url": server.url, "env_id": OBEDIENT}
    with EnvPool("agentropy/Remote-v0", kwargs, num_envs=3, num_workers=1) as pool:
        for slot in range(2):
            pool.reset(slot, task="a", seed=slot)
        pool.wait(all=True)
        pool.fork(1, 2)
        pool.wait(all=True)
        for slot in range(3):
            pool.step(slot, "look")
        seen = {result.slot: result.observation for result in pool.wait(all=True)}
    local = gym.make(OBEDIENT).unwrapped
    for slot, seed in ((0, 0), (1, 1), (2, 1)):
        local.reset(seed=seed, options={"task": "a"})
        assert seen[slot] == local.step("look")[0]
    assert until(lambda: sessions(server.url) == 0)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_environments_of_clients(server: BackgroundServer, mode: str) -> None:
    pytest.importorskip("alfworld")
    envs = gym.make_vec(
        "agentropy/Remote-v0", 2, mode, url=server.url, env_id=ALFWORLD, env_kwargs=FEW, vector_kwargs=NEXT_STEP
    )
    local = gym.make(ALFWORLD, **FEW)
    try:
        observations, _ = envs.reset(seed=[0, 1])
        assert [local.reset(seed=seed)[0] for seed in (0, 1)] == list(observations)
        assert envs.step(("look", "look"))[0][1] == local.step("look")[0]
    finally:
        envs.close()
    assert until(lambda: sessions(server.url) == 0)
