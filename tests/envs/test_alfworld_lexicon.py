"""A vocabulary made of the lexicon alone can write down everything that ALFWorld says and accepts."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("textworld")
pytest.importorskip("fast_downward")

from transformers import PreTrainedTokenizerFast

from agentropy.agents.tokenizer import build_word_tokenizer
from agentropy.envs.alfworld.domain import display_names
from agentropy.envs.alfworld.env import ALFWorldEnv
from agentropy.envs.alfworld.games import SPLITS, GameIndex, open_index
from agentropy.envs.alfworld.lexicon import HIGHEST_NUMBER, MANY, lexicon


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_word_tokenizer(lexicon())


def unknown(tokenizer: PreTrainedTokenizerFast, texts: set[str]) -> set[str]:
    """Return the texts in which there is a word that the tokenizer does not know."""
    return {text for text in texts if tokenizer.unk_token_id in tokenizer(text).input_ids}


def named(index: GameIndex, split: str) -> Iterator[str]:
    """Yield the goals of about a thousand games, and the names of all objects and receptacles that they tell of."""
    tasks = index.tasks(split)
    for task in tasks[:: max(1, len(tasks) // 1000)]:
        game = index.load(split, task)
        yield game.task
        facts = game.problem[game.problem.index("(:init") :]
        names = display_names(re.findall(r"\w+_bar_\w+", facts))
        yield from (name for name in names.values() if not name.startswith("loc "))


def assert_known(tokenizer: PreTrainedTokenizerFast, texts: set[str]) -> None:
    assert not unknown(tokenizer, texts)
    assert {"cabinet 20", "mug 2"} <= texts


@pytest.mark.parametrize("split", SPLITS)
def test_names_and_goals_of_generated_games_are_known(tokenizer, split):
    assert_known(tokenizer, set(named(open_index("generated"), split)))


@pytest.mark.parametrize("split", ["train", "valid_seen"])
def test_names_and_goals_of_published_games_are_known(tokenizer, shared_data, split):
    assert_known(tokenizer, set(named(open_index("pack", shared_data / "alfworld"), split)))


def played(source: str, data: Path | None, split: str, games: int) -> Iterator[str]:
    """Yield all that is said and offered in a few games, half of whose moves are random and half the expert's."""
    rng = np.random.default_rng(0)
    env = ALFWorldEnv(split, source, data, max_turns=40, expert_info=True)
    for _ in range(games):
        text, info = env.reset(seed=int(rng.integers(2**31)))
        yield info["goal"]
        over = False
        while not over:
            yield text
            yield from info["admissible"]
            action = info["expert"] if rng.random() < 0.5 else rng.choice(info["admissible"])
            text, _, terminated, truncated, info = env.step(str(action))
            over = terminated or truncated
        yield text


@pytest.mark.parametrize("split", SPLITS)
def test_everything_said_and_accepted_in_generated_games_is_known(tokenizer, split):
    assert not unknown(tokenizer, set(played("generated", None, split, games=4)))


def test_everything_said_and_accepted_in_published_games_is_known(tokenizer, shared_data):
    assert not unknown(tokenizer, set(played("pack", shared_data / "alfworld", "valid_seen", games=4)))


def test_commands_survive_the_tokenizer(tokenizer):
    _, info = ALFWorldEnv("valid_unseen").reset(seed=0)
    for command in info["admissible"]:
        ids = tokenizer(command).input_ids
        assert tokenizer.decode(ids) == command
        assert len(ids) == len(command.split()) - len(re.findall(r" \d+", command))


@pytest.mark.parametrize(("name", "highest"), [*MANY.items(), ("mug", HIGHEST_NUMBER), ("sinkbasin", HIGHEST_NUMBER)])
def test_names_are_known_up_to_their_highest_number(tokenizer, name, highest):
    words = [
        tokenizer.convert_ids_to_tokens(tokenizer(f"go to {name} {number}").input_ids)[2:]
        for number in range(1, highest + 2)
    ]
    assert words == [[f"{name} {number}"] for number in range(1, highest + 1)] + [["<unk>"]]


def test_each_text_stands_once_and_the_vocabulary_is_small(tokenizer):
    texts = lexicon()
    assert len(set(texts)) == len(texts) and list(texts) == sorted(texts)
    assert len(tokenizer) < 1500
