"""Claims about ``EnvPool``: order, determinism, forks, and what happens when worlds or processes go wrong."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest

from agentropy.envs.pool import EnvPool, EnvResult
from agentropy.errors import EnvironmentFailedError, UsageError

HERE = Path(__file__).parent
MakePool = Callable[..., EnvPool]


@pytest.fixture
def make_pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePool]:
    """Make pools of ``Obedient-v0``; afterwards they are closed and have left no process behind."""
    monkeypatch.syspath_prepend(str(HERE))
    pools = []
    before = set(children(os.getpid()))

    def make(num_envs: int = 4, num_workers: int = 2, env: str = "pool_worlds:Obedient-v0", **options: Any) -> EnvPool:
        pools.append(EnvPool(env, options.pop("kwargs", {}), num_envs=num_envs, num_workers=num_workers, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()
    assert set(children(os.getpid())) <= before


def children(pid: int) -> list[int]:
    """The pids of the living children of ``pid``."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(map(alive, pids))


def begin(pool: EnvPool, *slots: int, seed: int = 0) -> list[EnvResult]:
    for slot in slots:
        pool.reset(slot, task=f"t{slot}", seed=seed)
    return sorted(pool.wait(all=True), key=lambda result: result.slot)


def play(pool: EnvPool, slot: int, action: str) -> EnvResult:
    pool.step(slot, action)
    (result,) = pool.wait([slot])
    return result


def test_whichever_finishes_first_is_handed_back_first(make_pool: MakePool) -> None:
    pool = make_pool()
    first = begin(pool, 0, 1)
    assert first[0].info["pid"] != first[1].info["pid"]
    pool.step(0, "sleep 0.3")
    pool.step(1, "look")
    assert [result.slot for result in pool.wait()] == [1]
    assert [result.slot for result in pool.wait()] == [0]


def test_wait_looks_only_at_the_slots_asked_for_and_keeps_the_others(make_pool: MakePool) -> None:
    pool = make_pool()
    begin(pool, 0, 1, 2)
    for slot in (0, 1, 2):
        pool.step(slot, "look")
    assert {result.slot for result in pool.wait([1, 2], all=True)} == {1, 2}
    assert [result.slot for result in pool.wait()] == [0]
    assert pool.wait(all=True) == []
    with pytest.raises(UsageError, match="nothing to wait for"):
        pool.wait()


def test_wait_gives_up_after_its_timeout(make_pool: MakePool) -> None:
    pool = make_pool()
    begin(pool, 0)
    pool.step(0, "sleep 0.3")
    assert pool.wait(timeout=0.02) == []
    assert [result.slot for result in pool.wait()] == [0]


def test_a_pool_plays_what_a_single_environment_plays(make_pool: MakePool) -> None:
    pool = make_pool(num_envs=6)
    env = gymnasium.make("Obedient-v0")
    for result in begin(pool, *range(6), seed=7):
        slot = result.slot
        observation, _ = env.reset(seed=7, options={"task": f"t{slot}"})
        assert (result.observation, result.reward) == (observation, 0.0)
        for action in ("look", "wait", "end"):
            result, expected = play(pool, slot, action), env.step(action)
            assert (result.observation, result.reward, result.terminated, result.truncated) == expected[:4]
            assert {**result.info, "pid": 0} == {**expected[4], "pid": 0}


def test_the_time_limit_truncates_and_survives_a_fork(make_pool: MakePool) -> None:
    pool = make_pool(kwargs={"max_episode_steps": 3})
    begin(pool, 0)
    assert not play(pool, 0, "look").truncated
    pool.fork(0, 1)
    assert not pool.wait()[0].truncated
    assert [play(pool, 1, "look").truncated for _ in range(2)] == [False, True]
    with pytest.raises(UsageError, match="no episode is under way in slot 1: the last one is over"):
        pool.step(1, "look")


def test_episodes_of_one_task_share_a_worker_and_the_load_is_even(make_pool: MakePool) -> None:
    pool = make_pool(num_envs=32)
    for round_ in range(3):
        for slot in range(32):
            pool.reset(slot, task=f"task {round_} {slot // 4}", seed=0)
        hosts = [result.info["pid"] for result in sorted(pool.wait(all=True), key=lambda result: result.slot)]
        assert all(len(set(hosts[first : first + 4])) == 1 for first in range(0, 32, 4))
        assert [hosts.count(host) for host in set(hosts)] == [16, 16]


def test_one_task_for_all_slots_still_uses_all_workers(make_pool: MakePool) -> None:
    pool = make_pool(num_envs=16)
    for slot in range(16):
        pool.reset(slot, task="the same", seed=0)
    hosts = [result.info["pid"] for result in pool.wait(all=True)]
    assert min(map(hosts.count, set(hosts))) >= 6


def test_a_fork_continues_as_its_source_would(make_pool: MakePool) -> None:
    pool = make_pool()
    begin(pool, 0, 1)
    before = play(pool, 0, "look")
    pool.fork(0, 3)
    (copy,) = pool.wait()
    assert (copy.slot, copy.observation, copy.info) == (3, before.observation, before.info)
    assert copy.reward == 0.0
    ahead = [play(pool, 0, action).observation for action in ("look", "wait")]
    assert [play(pool, 3, action).observation for action in ("look", "wait")] == ahead


def test_a_snapshot_restores_in_any_slot_and_worker_as_often_as_wanted(make_pool: MakePool) -> None:
    pool = make_pool()
    begin(pool, 0, 1)
    play(pool, 0, "look")
    snapshot = pickle.loads(pickle.dumps(pool.snapshot(0)))
    ahead = [play(pool, 0, "look").observation for _ in range(3)]
    for slot in (0, 1, 2, 3):
        pool.restore(slot, snapshot)
    assert {result.observation for result in pool.wait(all=True)} == {snapshot.result.observation}
    for slot in (3, 1, 0, 2):
        assert [play(pool, slot, "look").observation for _ in range(3)] == ahead


def test_an_exception_fails_the_episode_and_nothing_else(make_pool: MakePool) -> None:
    pool = make_pool()
    pids = [result.info["pid"] for result in begin(pool, 0, 1, 2, 3)]
    result = play(pool, 0, "raise")
    assert result.failed and result.terminated and result.reward == 0.0
    assert result.info == {"task": "t0", "won": False, "failed": True}
    assert result.error is not None and "TooMuchError: that was too much (pool_worlds.py:" in result.error
    assert play(pool, 2, "look").info["pid"] == pids[2] == pids[0]
    with pytest.raises(UsageError, match="no episode is under way in slot 0"):
        pool.step(0, "look")
    pool.reset(0, task="!raise")
    assert pool.wait()[0].failed
    assert begin(pool, 0)[0].info["pid"] == pids[0]


def test_an_answer_that_cannot_be_sent_is_a_failure(make_pool: MakePool) -> None:
    pool = make_pool()
    begin(pool, 0)
    result = play(pool, 0, "lambda")
    assert result.failed and "pickle" in str(result.error)


@pytest.mark.parametrize(("action", "how"), [("exit", "exit code 3"), ("segv", "SIGSEGV")])
def test_a_dead_worker_is_replaced_and_its_slots_are_reported(make_pool: MakePool, action: str, how: str) -> None:
    pool = make_pool(num_envs=6)
    pids = {result.slot: result.info["pid"] for result in begin(pool, *range(6))}
    mates = [slot for slot in range(6) if pids[slot] == pids[0]]
    assert len(mates) == 3
    for slot in (0, mates[1], 1):
        pool.step(slot, action if slot == 0 else "look")
    results = {result.slot: result for result in pool.wait(all=True)}
    assert [results[slot].failed for slot in (0, mates[1], 1)] == [True, True, False]
    assert how in str(results[0].error) and results[mates[1]].error == results[0].error
    idle = mates[2]
    with pytest.raises(EnvironmentFailedError, match=how):
        pool.snapshot(idle)
    lost = play(pool, idle, "look")
    assert lost.failed and lost.error == results[0].error and lost.info["task"] == f"t{idle}"
    assert not play(pool, 1, "look").failed
    again = begin(pool, *mates)
    assert not any(result.failed for result in again)
    assert {result.info["pid"] for result in again}.isdisjoint({pids[0]})


def test_a_worker_killed_while_idle_is_noticed(make_pool: MakePool) -> None:
    pool = make_pool()
    pids = [result.info["pid"] for result in begin(pool, 0, 1)]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert "SIGKILL" in str(play(pool, 0, "look").error)
    assert not begin(pool, 1)[0].failed
    assert pool.tasks("train") == ("a", "b", "c")


def test_a_result_that_was_on_its_way_outlives_its_worker(make_pool: MakePool) -> None:
    pool = make_pool(num_envs=2, num_workers=1)
    begin(pool, 0, 1)
    pool.step(0, "look")
    pool.step(1, "exit")
    results = {result.slot: result for result in pool.wait(all=True)}
    assert not results[0].failed and results[1].failed
    assert play(pool, 0, "look").failed


@pytest.mark.parametrize("action", ["hang", "sleep 1000"])
def test_a_hung_worker_is_killed_and_reported(make_pool: MakePool, action: str) -> None:
    pool = make_pool(timeout=1.0)
    begin(pool, 0, 1)
    pool.step(0, action)
    pool.step(1, "look")
    results = pool.wait(all=True)
    assert [(result.slot, result.failed) for result in results] == [(1, False), (0, True)]
    assert "gave no answer for 1 s and was killed" in str(results[1].error)
    assert not begin(pool, 0)[0].failed


def test_a_worker_that_no_longer_reads_does_not_block_the_parent(make_pool: MakePool) -> None:
    pool = make_pool(num_envs=2, num_workers=1, timeout=1.0)
    (first,) = begin(pool, 0)
    os.kill(first.info["pid"], signal.SIGSTOP)
    pool.step(0, "x" * 10_000_000)
    assert "gave no answer" in str(pool.wait()[0].error)
    assert not begin(pool, 0, 1)[0].failed


def test_time_that_the_parent_spends_elsewhere_is_not_held_against_a_worker(make_pool: MakePool) -> None:
    pool = make_pool(num_envs=3, num_workers=1, timeout=1.0)
    begin(pool, 0, 1, 2)
    for slot in range(3):
        pool.step(slot, "sleep 0.5")
    time.sleep(2.0)
    assert [result.failed for result in pool.wait(all=True)] == [False] * 3


def test_processes_that_a_world_started_end_with_its_worker(make_pool: MakePool) -> None:
    pool = make_pool()
    (first,) = begin(pool, 0)
    play(pool, 0, "child")
    (grandchild,) = children(first.info["pid"])
    pool.close()
    assert gone([grandchild])


def test_a_world_that_takes_more_memory_than_its_share_loses_its_episode_only(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=1, memory_limit=1 << 30)
    begin(pool, 0, 1)
    result = play(pool, 0, "grow 1100")
    assert result.failed and "MemoryError" in str(result.error)
    assert not play(pool, 1, "look").failed


def test_a_worker_that_has_grown_is_replaced_between_episodes(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=1, memory_limit=1 << 30)
    first = begin(pool, 0, 1)
    play(pool, 0, "grow 600")
    play(pool, 0, "end")
    pool.reset(0, task="a")
    assert pool.wait()[0].info["pid"] == first[0].info["pid"], "slot 1 still plays there"
    for slot in (0, 1):
        play(pool, slot, "end")
    later = begin(pool, 0, 1)
    assert {result.info["pid"] for result in later}.isdisjoint(result.info["pid"] for result in first)
    assert not any(result.failed for result in later)


def test_a_worker_that_is_left_alone_closes_what_no_episode_needs(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "closed"
    monkeypatch.setenv("OBEDIENT_CLOSED", str(log))
    pool = make_pool(num_envs=3, num_workers=2, idle_seconds=0.2)
    begin(pool, 0)
    pool.fork(0, 2)  # where its source is
    pool.wait()
    play(pool, 2, "end")
    pool.reset(2, task="elsewhere")  # on the other worker: what slot 2 had is free now
    pool.wait()
    end = time.monotonic() + 5.0
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert log.exists()
    assert not play(pool, 0, "look").failed and not play(pool, 2, "look").failed


def test_a_worker_that_is_left_alone_closes_ended_episodes_too(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "closed"
    monkeypatch.setenv("OBEDIENT_CLOSED", str(log))
    pool = make_pool(num_envs=2, num_workers=1, idle_seconds=0.2)
    begin(pool, 0, 1)
    play(pool, 0, "end")
    end = time.monotonic() + 5.0
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert log.read_text() == "closed\n"
    assert not play(pool, 1, "look").failed
    assert not begin(pool, 0)[0].failed


def test_a_worker_is_not_replaced_for_what_it_holds_from_the_start(make_pool: MakePool) -> None:
    pool = make_pool(num_envs=1, num_workers=1, memory_limit=1 << 30, kwargs={"fault": "grow 600"})
    pids = set()
    for _ in range(3):
        pids.add(begin(pool, 0)[0].info["pid"])
        play(pool, 0, "end")
    assert len(pids) == 1


def test_commands_are_listed_on_demand(make_pool: MakePool) -> None:
    pool = make_pool()
    begin(pool, 1)
    assert pool.admissible(1) == ("end", "turn 0")
    play(pool, 1, "look")
    assert pool.admissible(1) == ("end", "turn 1")
    with pytest.raises(UsageError, match="no episode is under way in slot 0"):
        pool.admissible(0)


def test_wrong_use_is_told_at_once(make_pool: MakePool) -> None:
    pool = make_pool()
    with pytest.raises(UsageError, match="no episode is under way in slot 2: reset it first"):
        pool.step(2, "look")
    with pytest.raises(UsageError, match="no slot 4: this pool has slots 0 to 3"):
        pool.reset(4)
    with pytest.raises(UsageError, match="no slot -1"):
        pool.wait([-1])
    begin(pool, 0)
    with pytest.raises(UsageError, match="cannot fork slot 0 into itself"):
        pool.fork(0, 0)
    pool.reset(1)
    for call in (lambda: pool.reset(1), lambda: pool.step(1, "look"), lambda: pool.fork(0, 1)):
        with pytest.raises(UsageError, match="slot 1 is busy"):
            call()
    pool.close()
    pool.close()
    for call in (lambda: pool.reset(0), lambda: pool.wait(), lambda: pool.tasks()):
        with pytest.raises(UsageError, match="the pool is closed"):
            call()
    with pytest.raises(UsageError, match="num_envs >= 1"):
        EnvPool("CartPole-v1", num_envs=0)


def test_what_a_world_cannot_do_is_told_at_once(make_pool: MakePool) -> None:
    pool = make_pool(env="pool_worlds:Forgetful-v0")
    begin(pool, 0)
    with pytest.raises(UsageError, match="cannot be forked"):
        pool.fork(0, 1)
    with pytest.raises(UsageError, match="cannot be forked"):
        pool.snapshot(0)
    with pytest.raises(UsageError, match="lists no tasks"):
        pool.tasks()
    assert not play(pool, 0, "look").failed


def test_an_environment_that_cannot_be_made_raises_here(make_pool: MakePool) -> None:
    from pool_worlds import TooMuchError

    with pytest.raises(gymnasium.error.UnregisteredEnv):
        make_pool(env="agentropy/NoSuchWorld-v0")
    with pytest.raises(ModuleNotFoundError):
        make_pool(env="no_such_module:World-v0")
    with pytest.raises(TypeError, match="colour"):
        make_pool(kwargs={"colour": "red"})
    with pytest.raises(TooMuchError) as caught:
        make_pool(kwargs={"fault": "raise"})
    assert str(caught.value) == "that was too much"
    with pytest.raises(EnvironmentFailedError, match="exit code 3"):
        make_pool(kwargs={"fault": "exit"})
    with pytest.raises(EnvironmentFailedError, match=r"no answer for 0\.8 s"):
        make_pool(kwargs={"fault": "hang"}, start_timeout=0.8)
    with pytest.raises(UsageError, match="cannot be sent to another process"):
        make_pool(kwargs={"fault": lambda: None})


def test_an_exception_in_tasks_raises_here(make_pool: MakePool) -> None:
    pool = make_pool()
    assert pool.tasks("train") == ("a", "b", "c")
    with pytest.raises(KeyError, match="test"):
        pool.tasks("test")


def test_a_forgotten_pool_ends_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    pool = EnvPool("pool_worlds:Obedient-v0", num_envs=2, num_workers=2)
    pids = [result.info["pid"] for result in begin(pool, 0, 1)]
    del pool
    gc.collect()
    assert gone(pids)


def test_workers_outlive_the_thread_that_made_the_pool(make_pool: MakePool) -> None:
    """PR_SET_PDEATHSIG follows the thread, not the process: a pool made in a short-lived thread must live on."""
    made: list[EnvPool] = []
    thread = threading.Thread(target=lambda: made.append(make_pool()))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert not any(result.failed for result in begin(made[0], 0, 1))


def test_a_fork_of_the_parent_does_not_end_the_workers() -> None:
    code = f"import os, sys; sys.path.insert(0, {str(HERE)!r})\n" + FORKING
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("a 1\n", "")


FORKING = """
from agentropy.envs.pool import EnvPool
pool = EnvPool("pool_worlds:Obedient-v0", num_envs=1)
pool.reset(0, task="a"), pool.wait()
if os.fork() == 0:
    sys.exit()
os.wait()
pool.step(0, "look")
print(pool.wait()[0].observation[:3])
"""

SCRIPT = """
import sys
from agentropy.envs.pool import EnvPool
pool = EnvPool("pool_worlds:Obedient-v0", num_envs=2, num_workers=2)
pool.reset(0, task="a", seed=0)
pool.reset(1, task="!print", seed=0)
pool.wait(all=True)
print(len(pool.tasks()))
"""


@pytest.mark.parametrize("how", ["file", "-c", "stdin", "-m"])
def test_scripts_need_no_main_guard_and_may_lack_a_file(tmp_path: Path, how: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = {"file": ["script.py"], "-c": ["-c", SCRIPT], "stdin": ["-"], "-m": ["-m", "script"]}[how]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=SCRIPT if how == "stdin" else None,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "a world that prints\n")


def test_a_class_of_the_main_module_is_told_apart(tmp_path: Path) -> None:
    code = (
        "import gymnasium\nfrom agentropy.envs.pool import EnvPool\nclass World(gymnasium.Env): pass\n"
        "gymnasium.register('World-v0', World)\nEnvPool('World-v0', num_envs=1)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "move it into a module of its own" in done.stderr.splitlines()[-1]


ORPHANS = """
import os, sys, threading, time
from agentropy.envs.pool import EnvPool
def make():
    global pool
    pool = EnvPool("pool_worlds:Obedient-v0", num_envs=2, num_workers=2)
if THREAD:
    thread = threading.Thread(target=make); thread.start(); thread.join()
else:
    make()
pool.reset(0), pool.reset(1), pool.wait(all=True)
pool.step(0, "hang")
print("ready", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "other thread"])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda blow: blow.name)
def test_no_worker_survives_its_parent(blow: signal.Signals, thread: bool) -> None:
    """One worker is busy for ever and the other idle; from another thread only the end of the stream tells."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHANS.replace("THREAD", str(thread))],
        env={**os.environ, "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        workers = children(parent.pid)
        assert len(workers) == 2
        parent.send_signal(blow)
        parent.communicate(timeout=20)
        assert gone(workers)
    finally:
        parent.kill()
        parent.communicate()
