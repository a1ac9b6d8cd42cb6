"""Sources of ALFWorld games: the published layout, packs, and what they say when something is not there."""

import gzip
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("alfworld")

from agentropy.envs.alfworld import dataset as dataset_module
from agentropy.envs.alfworld.dataset import DatasetIndex
from agentropy.envs.alfworld.domain import domain_pddl, grammar
from agentropy.envs.alfworld.env import ALFWorldEnv
from agentropy.envs.alfworld.games import GOAL_PLACEHOLDER, SPLITS, TASK_TYPES, goal_template, open_index
from agentropy.envs.alfworld.pack import PackIndex, write_pack
from agentropy.errors import UsageError

SENTENCE = "put a hot potato in fridge."
GAMES = {
    "train": [
        "pick_heat_then_place_in_recep-Potato-None-Fridge-2/trial_b",
        "look_at_obj_in_light-CD-None-DeskLamp-3/trial_a",
    ],
    "valid_seen": ["pick_two_obj_and_place-Mug-None-Desk-301/trial_c"],
}


def write_game(root: Path, split: str, task: str, **changes: object) -> None:
    folder = root / split / task
    folder.mkdir(parents=True)
    game = {
        "pddl_domain": domain_pddl(),
        "grammar": grammar(SENTENCE),
        "pddl_problem": f"(define (problem {task}))",
        "walkthrough": ["go to fridge 1", "look"],
        "solvable": True,
        **changes,
    }
    (folder / "game.tw-pddl").write_text(json.dumps(game))


@pytest.fixture
def layout(tmp_path, monkeypatch) -> Path:
    """A dataset in the published layout, and a cache of its own."""
    monkeypatch.setenv("AGENTROPY_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "data" / "json_2.1.1"
    for split, tasks in GAMES.items():
        for task in tasks:
            write_game(root, split, task)
    write_game(root, "train", "pick_and_place_simple-Mug-None-Desk-301/unsolved", solvable=False)
    write_game(root, "train", "pick_and_place_with_movable_recep-Mug-Pan-Desk-301/movable", solvable=True)
    write_game(root, "train", "pick_and_place_simple-AppleSliced-None-Desk-301/sliced", solvable=True)
    (root / "train" / "pick_and_place_simple-Mug-None-Shelf-301" / "no_game").mkdir(parents=True)
    return root.parent


def test_dataset_lists_solvable_games_in_sorted_order(layout):
    index = DatasetIndex(layout)
    assert index.splits == ("train", "valid_seen")
    assert index.tasks("train") == tuple(sorted(GAMES["train"]))
    assert DatasetIndex(layout / "json_2.1.1").tasks("train") == index.tasks("train")


def test_dataset_is_found_through_the_environment_variable(layout, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(layout))
    assert open_index("dataset").tasks("valid_seen") == tuple(GAMES["valid_seen"])


def test_dataset_game_has_every_part(layout):
    task = GAMES["train"][0]
    game = DatasetIndex(layout).load("train", task)
    assert (game.id, game.split, game.task, game.task_type) == (
        task,
        "train",
        SENTENCE,
        "pick_heat_then_place_in_recep",
    )
    assert game.walkthrough == ("go to fridge 1", "look")
    assert game.domain == domain_pddl()
    assert goal_template(game.grammar, game.task) == grammar(GOAL_PLACEHOLDER)


def test_dataset_is_scanned_once_until_its_folder_changes(layout, monkeypatch):
    scans = []
    scan = dataset_module._scan
    monkeypatch.setattr(dataset_module, "_scan", lambda folder: scans.append(folder) or scan(folder))
    for _ in range(3):
        DatasetIndex(layout).tasks("train")
    assert len(scans) == 1
    added = "pick_and_place_simple-Zebra-None-Desk-301/added"
    write_game(layout / "json_2.1.1", "train", added)
    os.utime(layout / "json_2.1.1" / "train", ns=(1, 1))
    assert added in DatasetIndex(layout).tasks("train")
    assert len(scans) == 2


def test_damaged_index_cache_is_ignored(layout, tmp_path):
    expected = DatasetIndex(layout).tasks("train")
    for path in (tmp_path / "cache" / "alfworld").iterdir():
        path.write_text('{"no')
    assert DatasetIndex(layout).tasks("train") == expected


@pytest.mark.parametrize("name", ["games.jsonl.xz", "games.jsonl.gz"])
def test_pack_gives_back_what_was_packed(layout, tmp_path, name):
    out = tmp_path / "pack" / name
    assert write_pack(layout, out) == {"train": 2, "valid_seen": 1}
    dataset = DatasetIndex(layout)
    for pack in (PackIndex(out), PackIndex(out.parent)):
        assert pack.splits == dataset.splits
        for split in dataset.splits:
            assert pack.tasks(split) == dataset.tasks(split)
            for task in dataset.tasks(split):
                assert pack.load(split, task) == dataset.load(split, task)
    assert sorted(item.name for item in out.parent.iterdir()) == sorted(["domain.pddl", "grammar.twl2", name])


def test_a_folder_receives_a_pack_that_is_found_in_it(layout, tmp_path):
    for out in (tmp_path, tmp_path / "new"):
        write_pack(layout, out)
        assert (out / "games.jsonl.xz").is_file()
        assert PackIndex(out).tasks("train") == DatasetIndex(layout).tasks("train")


def test_pack_without_domain_and_grammar_takes_the_wheels(layout, tmp_path):
    write_pack(layout, tmp_path / "pack" / "games.jsonl.gz")
    for name in ("domain.pddl", "grammar.twl2"):
        (tmp_path / "pack" / name).unlink()
    task = GAMES["train"][0]
    assert PackIndex(tmp_path / "pack").load("train", task) == DatasetIndex(layout).load("train", task)


def test_games_with_different_domains_do_not_fit_one_pack(layout, tmp_path):
    write_game(layout / "json_2.1.1", "train", "pick_and_place_simple-Egg-None-Desk-301/odd", pddl_domain="other")
    with pytest.raises(UsageError, match="another domain"):
        write_pack(layout, tmp_path / "pack" / "games.jsonl.gz")
    assert list((tmp_path / "pack").iterdir()) == []


def test_published_pack_has_the_published_numbers_of_games(shared_data):
    """3,553 and 140 are the sizes of the splits of json_2.1.1 (Shridhar et al. 2021)."""
    index = open_index("pack", shared_data / "alfworld")
    assert index.splits == ("train", "valid_seen")
    assert len(index.tasks("train")) == 3553
    assert len(index.tasks("valid_seen")) == 140
    assert {task.split("-")[0] for task in index.tasks("train")} == set(TASK_TYPES)
    with pytest.raises(UsageError, match="which has train, valid_seen"):
        index.tasks("valid_unseen")


def test_generated_games_fill_every_split():
    index = open_index("generated")
    seen: set[str] = set()
    for split in SPLITS:
        tasks = index.tasks(split)
        assert list(tasks) == sorted(tasks)
        assert seen.isdisjoint(tasks)
        seen |= set(tasks)
        assert index.load(split, tasks[0]).split == split


def test_the_environment_draws_as_many_games_as_it_is_told():
    pytest.importorskip("fast_downward")
    env = ALFWorldEnv("valid_seen", num_games={"valid_seen": 3}, game_seed=5)
    assert len(env.tasks()) == 3 and len(env.tasks("valid_unseen")) == 200
    assert env.reset(seed=0)[1]["task"] in env.tasks()


def test_more_generated_games_can_be_drawn_and_another_seed_gives_others():
    more = open_index("generated", num_games={"train": 10_500})
    usual, other = open_index("generated"), open_index("generated", game_seed=1)
    assert len(more.tasks("train")) == 10_500 and more.tasks("valid_seen") == usual.tasks("valid_seen")
    assert set(usual.tasks("train")) < set(more.tasks("train"))
    task = usual.tasks("train")[0]
    assert more.load("train", task) == usual.load("train", task)
    common = sorted(set(other.tasks("train")) & set(usual.tasks("train")))
    assert len(common) < 200
    assert all(other.load("train", task) != usual.load("train", task) for task in common[:3])


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda path: open_index("packs", path), "did you mean 'pack'"),
        (lambda path: open_index("pack"), "needs data="),
        (lambda path: open_index("pack", path / "absent.jsonl.xz"), "no such pack"),
        (lambda path: open_index("pack", path), "no pack in"),
        (lambda path: open_index("pack", Path(__file__)), "ends in .jsonl.xz or .jsonl.gz"),
        (lambda path: open_index("dataset", path), "no ALFWorld dataset in"),
        (lambda path: open_index("generated", path), "takes no data"),
        (lambda path: open_index("pack", path, num_games={"train": 5}), "source='pack' takes no num_games"),
        (lambda path: open_index("dataset", path, game_seed=1), "source='dataset' takes no game_seed"),
        (lambda path: open_index("generated", num_games={"trian": 5}), "did you mean 'train'"),
        (lambda path: open_index("generated", game_seed=-1), "seed=-1"),
        (lambda path: open_index("generated").tasks("valid_sen"), "did you mean 'valid_seen'"),
        (lambda path: open_index("generated").load("train", "nonsense"), "unknown task 'nonsense'"),
        (lambda path: write_pack(path, path / "games.zip"), "ends in .jsonl.xz or .jsonl.gz"),
    ],
)
def test_bad_sources_are_named(attempt, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        attempt(tmp_path)


def test_missing_dataset_says_how_to_get_it(monkeypatch):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(UsageError, match="alfworld-download"):
        open_index("dataset")


def test_unknown_task_names_the_nearest(layout):
    task = GAMES["train"][0]
    with pytest.raises(UsageError, match=f"did you mean '{task}'"):
        DatasetIndex(layout).load("train", task[:-1])


def test_damaged_pack_is_named(tmp_path):
    path = tmp_path / "games.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"split": "train"}\n')[:-9])
    with pytest.raises(UsageError, match="not a readable pack"):
        PackIndex(path).tasks("train")
