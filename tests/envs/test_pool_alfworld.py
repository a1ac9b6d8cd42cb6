"""Claims about ``EnvPool`` with real ALFWorld games: many slots play what one environment plays."""

from __future__ import annotations

from collections.abc import Iterator

import gymnasium
import numpy as np
import pytest

from agentropy.envs.pool import EnvPool, EnvResult

WORLD = "agentropy/ALFWorld-v0"
TURNS = 8
Transcript = list[tuple[str, float, bool, bool, dict[str, object]]]


@pytest.fixture(scope="module")
def pool() -> Iterator[EnvPool]:
    with EnvPool(WORLD, {"max_turns": TURNS}, num_envs=64, num_workers=2) as pool:
        yield pool


def choose(info: dict[str, list[str]], generator: np.random.Generator) -> str:
    """A random admissible command, one time in five a meaningless one."""
    return "sing" if generator.random() < 0.2 else str(generator.choice(info["admissible"]))


def told(result: EnvResult) -> tuple[str, float, bool, bool, dict[str, object]]:
    return result.observation, result.reward, result.terminated, result.truncated, result.info


def alone(task: str, seed: int) -> Transcript:
    env = gymnasium.make(WORLD, max_turns=TURNS)
    generator = np.random.default_rng(seed)
    observation, info = env.reset(options={"task": task})
    transcript: Transcript = [(observation, 0.0, False, False, info)]
    while not (transcript[-1][2] or transcript[-1][3]):
        transcript.append(env.step(choose(transcript[-1][4], generator)))  # type: ignore[arg-type]
    return transcript


def test_sixty_four_slots_on_two_workers_play_what_one_environment_plays(pool: EnvPool) -> None:
    tasks = pool.tasks("train")[:8]
    generators = [np.random.default_rng(slot) for slot in range(64)]
    transcripts: list[Transcript] = [[] for _ in range(64)]
    for slot in range(64):
        pool.reset(slot, task=tasks[slot // 8])
    running = 64
    while running:
        for result in pool.wait():
            transcripts[result.slot].append(told(result))
            if result.terminated or result.truncated:
                running -= 1
            else:
                pool.step(result.slot, choose(result.info, generators[result.slot]))
    assert transcripts == [alone(tasks[slot // 8], slot) for slot in range(64)]


def test_forks_and_restored_snapshots_play_what_the_episode_plays(pool: EnvPool) -> None:
    first, second = pool.tasks("train")[:2]
    generator = np.random.default_rng(0)
    pool.reset(0, task=first)
    pool.reset(1, task=second)  # on the other worker
    (latest,) = pool.wait([0], all=True)
    pool.wait([1], all=True)
    for _ in range(3):
        pool.step(0, choose(latest.info, generator))
        (latest,) = pool.wait()
    snapshot = pool.snapshot(0)
    pool.fork(0, 2)
    pool.restore(1, snapshot)
    assert [told(result)[4] for result in pool.wait(all=True)] == [latest.info] * 2
    while not (latest.terminated or latest.truncated):
        action = choose(latest.info, generator)
        for slot in (0, 1, 2):
            pool.step(slot, action)
        latest, *copies = pool.wait(all=True)
        assert [told(copy) for copy in copies] == [told(latest)] * 2
