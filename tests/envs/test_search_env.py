"""Search as a Gymnasium environment: episodes, rewards, snapshots, the expert, and what it never does."""

import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("bm25s")
pytest.importorskip("Stemmer")

import gymnasium as gym
from gymnasium.utils.env_checker import check_env

from agentropy.envs.search.env import NOTHING, RIGHT, WRONG, SearchEnv
from agentropy.envs.search.messages import EXPECTED
from agentropy.envs.search.passages import Passage
from agentropy.envs.search.retriever import Hit
from agentropy.errors import UsageError

INFO_KEYS = {"free_text", "task", "split", "goal", "won", "score", "turn", "invalid", "question_id", "kind", "searches"}


@pytest.fixture(scope="module")
def env() -> SearchEnv:
    return SearchEnv(split="valid")


def act(env: SearchEnv, rng: np.random.Generator) -> str:
    """Return something that an agent might write."""
    question = env.restore(env.snapshot())[1]["goal"]
    words = question.split()
    first = int(rng.integers(len(words)))
    options = [
        f"<search>{' '.join(words[first : first + 3])}</search>",
        f"<think>Who?</think><search>{words[-1]}</search>",
        "I do not know.",
        "<search></search>",
        f"<answer>{words[first]}</answer>",
    ]
    return options[int(rng.choice(5, p=[0.4, 0.3, 0.1, 0.1, 0.1]))]


def test_an_episode_as_an_agent_reads_it():
    env = SearchEnv(hops=2, k=2, expert_info=True)
    assert env.tasks()[:2] == ("train-00000", "train-00001") and len(env.tasks()) == 2000
    observation, info = env.reset(options={"task": "train-00003"})
    assert observation == f"Question: {info['goal']}" and set(info) == INFO_KEYS | {"instructions", "expert"}
    assert (info["searches"], info["won"], info["score"], info["kind"]) == (0, False, 0.0, "2 hops")
    bridge = env._question.gold[1]
    observation, reward, over, cut, info = env.step(info["expert"])
    lines = observation.split("\n")
    assert len(lines) == 2 and lines[0].startswith(f"1. {env._question.gold[0]}: ") and bridge in lines[0]
    assert lines[1].startswith("2. ") and (reward, over, cut, info["searches"]) == (0.0, False, False, 1)
    assert info["expert"] == f"<search>{bridge}</search>" and "answers" not in info
    _, _, _, _, info = env.step(info["expert"])
    observation, reward, over, cut, info = env.step(info["expert"])
    assert (observation, reward, over, cut, info["won"], info["score"]) == (RIGHT, 1.0, True, False, True, 1.0)
    assert info["answers"] == list(env._question.answers) and info["expert"] is None


def test_gymnasiums_checker_has_no_complaint():
    check_env(gym.make("agentropy/Search-v0", render_mode="ansi").unwrapped)


@pytest.mark.parametrize("k", [1, 3])
def test_the_expert_wins_every_question_with_one_search_per_passage_at_most(k):
    env = SearchEnv(k=k)
    for split in env.splits:
        for task in env.tasks(split)[:: 1 if split == "valid" else 9]:
            env.reset(options={"task": task})
            for action in env.expert():
                info = env.step(action)[-1]
            assert info["won"] and info["turn"] <= len(env._question.gold) + 1, task


def test_the_experts_queries_are_made_of_what_the_episode_has_named():
    env = SearchEnv(split="test", k=1)
    for task in env.tasks():
        read = env.reset(options={"task": task})[0]
        for action in env.expert():
            query = action.partition(">")[2].partition("<")[0]
            assert query in read, (task, action)
            read += env.step(action)[0]


def test_the_expert_goes_on_from_wherever_an_agent_has_strayed(env):
    rng = np.random.default_rng(1)
    wins = 0
    for seed in range(40):
        env.reset(seed=seed)
        for _ in range(3):
            action = act(env, rng)
            if "<answer>" not in action:
                env.step(action)
        for action in env.expert():
            info = env.step(action)[-1]
        wins += info["won"]
    assert wins == 40  # at most five messages are needed, and five of eight turns are left


def test_one_search_with_the_question_seldom_finds_everything(env):
    questions = [env._source.questions("valid")[task] for task in env.tasks()]
    found = env._open("valid").search([question.text for question in questions], 3)
    complete = [set(q.gold) <= {hit.passage.title for hit in hits} for q, hits in zip(questions, found, strict=True)]
    assert sum(complete) / len(complete) < 0.05
    # But the passage to start from is there.
    first = [q.gold[0] in {hit.passage.title for hit in hits} for q, hits in zip(questions, found, strict=True)]
    assert sum(first) / len(first) > 0.9


@pytest.mark.parametrize(
    ("options", "actions", "rewards"),
    [
        ({}, ["<answer>{gold}</answer>"], [1.0]),
        ({}, ["<answer>{gold} and more</answer>"], [0.0]),
        # Two right words of four, and of the two that are asked for.
        ({"reward": "f1"}, ["<answer>{gold} and more</answer>"], [2 / 3]),
        ({"reward_scale": 10}, ["<search>x</search>", "<answer>the {gold}.</answer>"], [0.0, 10.0]),
        ({"format_reward": 0.2}, ["<think>x</think><answer>{gold}</answer>"], [1.2]),
        ({"format_reward": 0.2}, ["It is <answer>{gold}</answer>"], [1.0]),
        ({"format_reward": 0.2}, ["<answer>nobody</answer>"], [0.2]),
        ({"format_reward": 0.2}, ["what?", "<answer>{gold}</answer>"], [0.0, 1.0]),
        ({"invalid_penalty": 0.1}, ["what?", "<search></search>", "<answer>{gold}</answer>"], [-0.1, -0.1, 1.0]),
        # ARPO, Eq. 8, with token F1.
        ({"reward": "arpo"}, ["<search>x</search>", "<answer>{gold} and more</answer>"], [0.0, 2 / 3]),
        ({"reward": "arpo"}, ["<answer>nobody</answer>"], [0.0]),
        ({"reward": "arpo"}, ["what?", "<answer>{gold}</answer>"], [0.0, -1.0]),
        ({"reward": "arpo"}, ["<search>x</search> please", "<answer>{gold}</answer>"], [0.0, -1.0]),
        ({"reward": "arpo", "max_turns": 2}, ["<search>x</search>", "<search>y</search>"], [0.0, -1.0]),
        ({"reward": "arpo", "max_turns": 2}, ["<search>x</search>", "<answer>{gold}</answer>"], [0.0, 1.0]),
        ({"reward": "em", "max_turns": 2}, ["<search>x</search>", "what?"], [0.0, 0.0]),
    ],
)
def test_rewards(options, actions, rewards):
    env = SearchEnv(hops=2, **options)
    task = next(id for id in env.tasks() if len(env._source.questions("train")[id].answers[0].split()) == 2)
    env.reset(options={"task": task})
    gold = env._question.answers[0]
    paid = [env.step(action.format(gold=gold))[1] for action in actions]
    assert paid == pytest.approx(rewards, abs=1e-12)


def test_a_message_that_is_neither_costs_a_turn_and_is_told_how(env):
    env.reset(seed=0)
    observation, reward, over, cut, info = env.step("Halenfel")
    assert (observation, reward, over, cut) == (EXPECTED, 0.0, False, False)
    assert info["invalid"] and (info["turn"], info["searches"]) == (1, 0)
    observation, *_, info = env.step("<search>zzzz</search>")
    assert observation == NOTHING and not info["invalid"] and info["searches"] == 1
    assert env.step("<answer>nobody</answer>")[0] == WRONG


def test_without_an_answer_the_episode_is_truncated():
    env = SearchEnv(max_turns=2)
    env.reset(seed=0)
    assert env.step("<search>x</search>")[2:4] == (False, False)
    *_, over, cut, info = env.step("<search>x</search>")
    assert (over, cut) == (False, True) and "answers" not in info and not info["won"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00",
        "\ud800",
        "é" * 100_000,
        "<search>" + "ab " * 33_000 + "</search>",
        "<think>" * 15_000,
        "<answer>" + "x" * 100_000 + "</answer>",
        "<search>\u202e\U0001f600</search>",
    ],
)
def test_no_text_raises(env, text):
    env.reset(seed=0)
    observation, *_ = env.step(text)
    assert env.observation_space.contains(observation) and observation
    observation.encode()
    pickle.loads(pickle.dumps(env.snapshot()))


def test_going_on_from_a_snapshot_equals_never_having_left(env):
    rng = np.random.default_rng(0)
    other = pickle.loads(pickle.dumps(SearchEnv(split="test")))
    for seed in range(50):
        env.reset(seed=seed)
        before = [env.step(a) for a in ("<search>The</search>", "hm")[: seed % 3]]
        snapshot = pickle.loads(pickle.dumps(env.snapshot()))
        actions, straight = [], []
        while True:
            actions.append(act(env, rng))
            straight.append(env.step(actions[-1]))
            if straight[-1][2] or straight[-1][3]:
                break
        for place in (env, other):
            observation, info = place.restore(snapshot)
            if before:
                assert (observation, info) == (before[-1][0], before[-1][4])
            assert [place.step(action) for action in actions] == straight


def test_a_snapshot_is_small_and_of_one_world():
    env = SearchEnv()
    env.reset(seed=0)
    env.step("<search>Theatre</search>")
    snapshot = env.snapshot()
    assert len(pickle.dumps(snapshot)) < 4000
    with pytest.raises(UsageError, match="another task called"):
        SearchEnv(game_seed=1).restore(snapshot)


EPISODE = """
import json, sys
from agentropy.envs.search.env import SearchEnv
env = SearchEnv(split="test", retriever=sys.argv[1])
seen = [env.tasks_hash()]
for seed in range(5):
    seen.append(env.reset(seed=seed))
    seen += [env.step(action) for action in env.expert()]
print(json.dumps(seen))
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.mark.parametrize("retriever", ["bm25", "hybrid"])
def test_episodes_are_the_same_in_every_process(retriever):
    def run(hash_seed: str) -> str:
        command = [sys.executable, "-c", EPISODE, retriever]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    first = run("1")
    assert run("2") == first and json.loads(first)


def test_global_generators_are_neither_read_nor_written():
    def episode() -> list:
        env = SearchEnv(game_seed=5)
        return [env.reset(seed=1), *[env.step(action) for action in env.expert()]]

    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = episode()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(2)
    np.random.seed(2)
    assert episode() == first


def test_the_vocabulary_is_learned_from_texts_like_those_of_training():
    env = SearchEnv()
    texts = env.corpus(tasks=10)
    assert texts == env.corpus(tasks=10) and len(texts) == len(set(texts)) > 100
    assert "\n3. " in "".join(texts)
    assert env.instructions in texts and RIGHT in texts
    assert any(text.startswith("Question: ") for text in texts)
    assert any(text.startswith("<search>") for text in texts) and any(text.startswith("<answer>") for text in texts)
    joined = "\n".join(texts)
    assert not any(f"1. {passage.title}:" in joined for passage in env._source.corpus("test").passages)


def test_ones_own_files_and_retriever(tmp_path):
    (tmp_path / "q.jsonl").write_text(
        json.dumps({"id": "one", "question": "Which river?", "answer": ["Ister", "Isar"]})
    )
    (tmp_path / "p.jsonl").write_text(json.dumps({"title": "Calden", "text": "Calden lies on the Ister. " * 9}))
    files = {"source": "files", "questions": tmp_path / "q.jsonl", "passages": tmp_path / "p.jsonl"}
    env = SearchEnv(**files, max_passage=20)
    assert env.splits == ("train",) and env.tasks() == ("one",)
    env.reset(seed=0)
    assert env.step("<search>Calden</search>")[0] == "1. Calden: Calden lies on the I…"
    assert env.step("<answer>isar</answer>")[4]["won"]

    class Mine:
        def search(self, queries, k):
            return [[Hit(Passage("0", "", f"{query}!"), 1.0)] for query in queries]

        def close(self):
            pass

    env = SearchEnv(**files, retriever=Mine())
    env.reset(seed=0)
    assert env.step("<search>Calden</search>")[0] == "1. Calden!"
    assert next(env.expert()) == "<answer>Ister</answer>"


def test_the_expert_answers_the_shared_questions(shared_data):
    env = SearchEnv(source="shared", data=shared_data / "search")
    found = asked = 0
    for task in env.tasks()[::6]:
        env.reset(options={"task": task})
        for action in env.expert():
            info = env.step(action)[-1]
        assert info["won"]
        found += len(env._point.found & set(env._question.gold))
        asked += len(env._question.gold)
    assert found > 0.95 * asked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "trian"}, "did you mean 'train'"),
        ({"reward": "arpp"}, "did you mean 'arpo'"),
        ({"k": 0}, "at least 1"),
        ({"retriever": "bm52"}, "did you mean 'bm25'"),
        ({"source": "shard"}, "did you mean 'shared'"),
        ({"hops": 5}, "some of 2, 3, 4"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        SearchEnv(**options)
