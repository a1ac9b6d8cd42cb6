"""What single methods ask of the trainer: forks, more rollouts, a critic, and a memory that survives a kill."""

import gzip
import io
import json
import re
import threading

import gymnasium
import pytest
import torch
from rich.console import Console

from agentropy.agents.tree import Tree
from agentropy.algorithms.batch import Minibatch
from agentropy.algorithms.display import Display
from agentropy.algorithms.runs import TIME_PREFIX, RunFolder
from agentropy.algorithms.trainer import Trainer
from agentropy.config import load_config
from agentropy.errors import UsageError

from ..agents.scripted import Scripted, obedient

TINY = [
    'device="cpu"',
    "threads=1",
    "env.workers=1",
    "env.kwargs.max_turns=6",
    "model.hidden=32",
    "model.layers=1",
    "model.heads=2",
    "model.intermediate=32",
    "sft.tasks=4",
    "sft.epochs=1",
    "train.steps=3",
    "train.tasks_per_step=2",
    "train.group_size=4",
    "train.minibatches=2",
    "eval.tasks=2",
]


def begin(folder, *options):
    config = load_config(None, [*TINY, f'run_dir="{folder}"', *options])
    return Trainer(RunFolder.plan(config), Display(Console(file=io.StringIO())))


def rows(folder):
    return [
        {key: value for key, value in row.items() if not key.startswith(TIME_PREFIX)}
        for row in RunFolder.open(folder).rows()
    ]


def trees(folder, step):
    with gzip.open(folder / "trajectories" / f"step-{step:06d}.jsonl.gz", "rt") as file:
        return [Tree.from_dict(json.loads(line)) for line in file]


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        # A critic, a history of entropies, and roots of earlier batches: all that a recipe can remember.
        [
            'algorithm.name="ppo+epo+arpo"',
            'algorithm.overrides={rule="bernoulli", root="slot", align=false, entropy_top_k=5, "epo.alpha"=2.0}',
        ],
        ['algorithm.name="dapo"', "algorithm.overrides={max_batches=3}", "env.train_kwargs={max_turns=4}"],
    ],
)
def test_a_run_that_breaks_off_and_resumes_equals_the_undisturbed_one(tmp_path, options, monkeypatch):
    whole = begin(tmp_path / "whole", *options)
    whole.train()
    broken = begin(tmp_path / "broken", *options)
    original = Trainer._train_step

    def until_the_third(self, *arguments):
        if self.step == 3:
            raise Killed
        original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", until_the_third)
        with pytest.raises(Killed):
            broken.train()
    resumed = Trainer(RunFolder.open(tmp_path / "broken"), Display(Console(file=io.StringIO())))
    assert resumed.step == 2
    resumed.train()
    assert rows(tmp_path / "broken") == rows(tmp_path / "whole")
    for step in (1, 2, 3):
        assert [tree.to_dict() for tree in trees(tmp_path / "broken", step)] == [
            tree.to_dict() for tree in trees(tmp_path / "whole", step)
        ]
    assert resumed.recipe.state_dict() == whole.recipe.state_dict()
    for one, two in zip(resumed.agent.model.parameters(), whole.agent.model.parameters(), strict=True):
        assert torch.equal(one, two)
    trained = [row for row in rows(tmp_path / "whole") if row["phase"] == "train"]
    if "arpo" in options[0]:
        assert all(
            torch.equal(a, b)
            for a, b in zip(resumed.learner.critic.parameters(), whole.learner.critic.parameters(), strict=True)
        )
        assert resumed.recipe.branching.slot_roots
        assert all(row["entropy/top_k"] == 5 and row["branch/forks"] > 0 for row in trained)
    else:
        # Two tasks a step are learned from; where all episodes of one earned the same, others were played instead.
        assert all(row["episodes"] % 8 == 0 and 8 <= row["episodes"] <= 24 for row in trained)
        assert whole.drawn == sum(row["episodes"] for row in trained) // 4
        for row in trained:
            played = row["episodes"] // 4
            assert round(row["sampler/kept"] * played) >= 2 or played == 6
            assert row["groups/informative"] == min(2, round(row["sampler/kept"] * played)) / 2


def test_estimated_entropies_fork_and_exact_ones_are_learned_from(tmp_path, monkeypatch):
    seen = []
    original = Minibatch.from_trees.__func__

    def remember(cls, found):
        batch = original(cls, found)
        seen.append(batch)
        return batch

    trainer = begin(
        tmp_path / "run",
        'algorithm.name="arpo"',
        "algorithm.overrides={entropy_top_k=2}",
        "sft.tasks=0",
        "train.steps=1",
    )
    updates = []
    update = trainer.learner.update
    monkeypatch.setattr(
        trainer.learner, "update", lambda batch, generator: updates.append(batch) or update(batch, generator)
    )
    monkeypatch.setattr(Minibatch, "from_trees", classmethod(remember))
    trainer.train()
    estimate, exact = seen[-1].old_entropy, updates[0].old_entropy
    mask = updates[0].mask
    assert (estimate[mask] < exact[mask] - 1e-3).any() and (estimate[mask] <= exact[mask] + 1e-4).all()
    (row,) = [row for row in rows(tmp_path / "run") if row["phase"] == "train"]
    assert row["entropy/action_mean"] == pytest.approx(exact[mask].mean().item(), rel=1e-5)
    assert row["entropy/estimate"] < row["entropy/action_mean"] and row["entropy/top_k"] == 2


def test_an_engine_that_only_estimates_entropies_is_not_taken_for_exact(tmp_path, monkeypatch):
    trainer = begin(tmp_path / "run", "sft.tasks=0", "train.steps=1", 'engine.dtype="bfloat16"')
    trainer.engine.entropy_top_k = 20
    updates = []
    update = trainer.learner.update
    monkeypatch.setattr(
        trainer.learner, "update", lambda batch, generator: updates.append(batch) or update(batch, generator)
    )
    trainer.train()
    (row,) = [row for row in rows(tmp_path / "run") if row["phase"] == "train"]
    exact = updates[0].old_entropy[updates[0].mask].mean().item()
    assert row["entropy/action_mean"] == pytest.approx(exact, rel=1e-5) and "entropy/estimate" in row
    assert all(row["entropy/top_k"] == 20 for row in rows(tmp_path / "run") if row["phase"] in ("train", "eval"))


@pytest.mark.parametrize("name", ["rloo", "dapo"])
def test_groups_of_one_are_refused_where_they_would_teach_nothing(tmp_path, name):
    with pytest.raises(UsageError, match=f"train.group_size is 1; '{name}' compares"):
        begin(tmp_path / "run", f'algorithm.name="{name}"', "train.group_size=1")
    assert not (tmp_path / "run").exists()


def test_a_server_that_takes_no_weights_is_refused_before_the_warm_start(tmp_path):
    with Scripted(obedient) as server, pytest.raises(UsageError, match="this server takes no weights"):
        begin(tmp_path / "run", 'engine.type="http"', f'engine.options={{url="{server.url}", vocabulary=5000}}')
    assert not (tmp_path / "run").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "agentropy http engine"]


def test_a_warm_start_that_breaks_off_leaves_no_threads(tmp_path, monkeypatch):
    def killed(*_arguments, **_options):
        raise Killed

    trainer = begin(tmp_path / "run", "train.workers=2", "train.micro_batch_tokens=64")
    monkeypatch.setattr(Trainer, "_log", killed)
    with pytest.raises(Killed):
        trainer.train()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("agentropy-update")]


class Fleeting(gymnasium.Env):
    """A text world without snapshots."""

    def __init__(self, split="train", max_turns=6):
        self.observation_space = self.action_space = gymnasium.spaces.Text(20)

    def tasks(self, split):
        return ("task",)


def test_a_world_that_cannot_be_copied_is_refused_before_anything_is_spent(tmp_path):
    gymnasium.register("tests/Fleeting-v0", entry_point=Fleeting)
    try:
        for name in ("arpo", "aepo", "dapo+arpo"):
            with pytest.raises(
                UsageError, match=rf"'tests/Fleeting-v0' cannot be forked: .* which '{re.escape(name)}' needs"
            ):
                begin(tmp_path / "run", f'algorithm.name="{name}"', 'env.id="tests/Fleeting-v0"')
    finally:
        del gymnasium.registry["tests/Fleeting-v0"]
    assert not (tmp_path / "run").exists()
