"""Credit of tokens beside the trajectories, and what the recorder adds to a run."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms import Minibatch, recipe, recipes
from agentropy.algorithms.display import Display
from agentropy.algorithms.instruments.alarms import alarms
from agentropy.algorithms.instruments.credit import credit_of, credit_path, load_credit, save_credit
from agentropy.algorithms.instruments.law import FEWEST_POINTS
from agentropy.algorithms.instruments.recorder import Recorder
from agentropy.algorithms.runs import RunFolder
from agentropy.config import load_config
from agentropy.errors import UsageError

from .test_trainer_methods import TINY, begin, rows, trees


def group(seed, *, window=False):
    """Four episodes of a task: two that fork after their first turn, one that failed, and one of its own."""
    rng = np.random.default_rng(seed)
    tree = Tree(f"task {seed}", "train")

    def act(parent, turn):
        size = int(rng.integers(1, 4))
        numbers = rng.exponential(size=(2, size)).astype(np.float32)
        return tree.add(
            parent, "action", rng.integers(6, 30, size), sampled=True, logprobs=-numbers[0], entropies=numbers[1],
            turn=turn, reward=float(rng.integers(0, 2)), text=f"say {rng.integers(0, 3)}",
        )  # fmt: skip

    prompt = tree.add(-1, "prompt", [1, 2], text="room")
    shared = tree.add(act(prompt, 0), "observation", [3], turn=0, text="hall")
    one, two = act(shared, 1), act(shared, 1)
    failed = act(prompt, 0)
    own = act(tree.add(act(prompt, 0), "observation", [4, 5], turn=0, text="attic"), 1)
    leaves = [(one,), (two,), (failed,), (own,)]
    if window:
        leaves[3] = (act(tree.add(-1, "prompt", [1, 7]), 0), act(tree.add(-1, "prompt", [1, 8, 9]), 1))
    for number, each in enumerate(leaves):
        won = bool(rng.integers(0, 2))
        reward = float(won) + 0.1 * number
        tree.trajectories.append(Trajectory(each, reward=reward, won=won, turns=2, failed=number == 2))
    return tree


def planned(name, forest):
    batch = Minibatch.from_trees(forest)
    batch = batch.replace(values=torch.randn(batch.mask.shape), ref_logprobs=batch.old_logprobs)
    return batch, recipe(name, total_steps=10).plan(batch)


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize("window", [False, True])
def test_credit_is_that_of_the_plan_token_by_token(name, window, tmp_path):
    forest = [group(0, window=window), group(1), group(2)]
    batch, plan = planned(name, forest)
    save_credit(tmp_path / "credit.npz", credit_of(forest, batch, plan))
    credit = load_credit(tmp_path / "credit.npz")
    row = 0
    for number, tree in enumerate(forest):
        for place, trajectory in enumerate(tree.trajectories):
            for leaf in () if trajectory.failed else trajectory.leaves:
                assert (credit.tree[row], credit.trajectory[row], credit.leaf[row]) == (number, place, leaf)
                at = np.flatnonzero(tree.mask(leaf))
                advantage, weight = credit.row(number, leaf)
                assert len(at) == len(advantage) == credit.start[row + 1] - credit.start[row]
                assert advantage.tolist() == pytest.approx(plan.advantages[row, at].tolist())
                count = int(batch.mask.sum())
                assert weight.tolist() == pytest.approx((plan.coefficients[row, at] * count).tolist(), rel=1e-5)
                row += 1
    assert row == len(credit) == len(batch)
    assert credit.row(0, 0) is None and (credit.tree.dtype, credit.start.dtype) == (np.int32, np.int64)


def test_weights_are_one_in_a_plain_mean_and_zero_where_masked():
    forest = [group(0), group(1)]
    batch, plan = planned("dapo", forest)  # a mean over tokens
    assert credit_of(forest, batch, plan).weight == pytest.approx(np.ones(int(batch.mask.sum())))
    coefficients = plan.coefficients.clone()
    coefficients[1] = 0
    plan = type(plan)(**{**vars(plan), "coefficients": coefficients})
    _, weight = credit_of(forest, batch, plan).row(0, forest[0].trajectories[1].leaves[0])
    assert not weight.any()


def test_equal_credits_are_equal_files(tmp_path):
    forest = [group(0)]
    credit = credit_of(forest, *planned("grpo", forest))
    for name in ("a.npz", "b.npz"):
        save_credit(tmp_path / name, credit)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_a_batch_of_other_trees_is_refused():
    batch, plan = planned("grpo", [group(0)])
    with pytest.raises(ValueError, match="was not made of trees with 6 leaves"):
        credit_of([group(0), group(1)], batch, plan)


def test_what_is_no_credit_is_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_credit(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", tree=np.zeros(1))
    (tmp_path / "empty.npz").write_bytes(b"")
    forest = [group(0)]
    save_credit(tmp_path / "cut.npz", credit_of(forest, *planned("grpo", forest)))
    data = bytearray((tmp_path / "cut.npz").read_bytes())
    at = data.index(b"advantage.npy") + len(b"advantage.npy")
    data[at : at + 24] = bytes(24)
    (tmp_path / "cut.npz").write_bytes(data)
    for name in ("text", "other", "empty", "cut"):
        with pytest.raises(UsageError, match="holds no credit of tokens"):
            load_credit(tmp_path / f"{name}.npz")
    fields = {name: np.zeros(2, np.int32) for name in ("tree", "trajectory", "leaf", "start", "advantage", "weight")}
    np.savez(tmp_path / "short.npz", **fields)
    np.savez(tmp_path / "flat.npz", **dict.fromkeys(fields, np.int32(0)))
    for name in ("short", "flat"):
        with pytest.raises(UsageError, match="do not fit each other"):
            load_credit(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("name", ["arpo", "ppo"])
def test_a_run_leaves_the_credit_of_its_trajectories(tmp_path, name):
    begin(tmp_path / "run", f'algorithm.name="{name}"', "train.oracle=true", "train.steps=2").train()
    for step in (1, 2):
        credit, forest = load_credit(credit_path(tmp_path / "run", step)), trees(tmp_path / "run", step)
        assert len(credit) == sum(len(each.leaves) for tree in forest for each in tree.trajectories if not each.failed)
        for row in range(len(credit)):
            tree = forest[credit.tree[row]]
            assert credit.leaf[row] in tree.trajectories[credit.trajectory[row]].leaves
            assert credit.start[row + 1] - credit.start[row] == tree.mask(credit.leaf[row]).sum()
    metrics = [row for row in rows(tmp_path / "run") if row["phase"] == "train"]
    for row in metrics:
        assert row["entropy/by_turn"] and {"oracle/predicted", "oracle/measured", "group/unique"} <= row.keys()
        assert row["alarm/entropy_collapse"] == 0
    assert metrics[0]["entropy/fork_threshold"] == metrics[1]["entropy/fork_threshold"]


def test_without_trajectories_there_is_no_credit_and_without_an_oracle_no_prediction(tmp_path):
    begin(tmp_path / "run", "train.steps=1", "train.save_trajectories=false").train()
    assert not list((tmp_path / "run" / "trajectories").iterdir())
    (row,) = [row for row in rows(tmp_path / "run") if row["phase"] == "train"]
    assert not any(name.startswith("oracle/") for name in row)


def row_of(step):
    entropy = 0.6 if step <= 6 else 0.1
    rate = (10 + step) / 40
    return {
        "success/rate": rate, "success/low": rate - 0.1, "success/high": rate + 0.1,
        "entropy/action_mean": entropy, "entropy/top_k": 0,
    }  # fmt: skip


class Agent:
    tokenizer = None
    format = None


def test_a_resumed_recorder_repeats_what_an_undisturbed_one_records(tmp_path):
    """Law, alarms and forking tokens look back over all steps, and come from the rows alone."""
    config = load_config(None, [*TINY, f'run_dir="{tmp_path / "run"}"'])
    steps, seen, printed = FEWEST_POINTS + 4, [], []
    for broken in (0, 9):
        run = RunFolder(tmp_path / f"run{broken}", config)
        run.make()
        output = io.StringIO()
        recorder = Recorder(run, Display(Console(file=output, width=200)), plain())
        found = []
        for step in range(1, steps + 1):
            if step == broken:
                recorder = Recorder(run, Display(Console(file=output, width=200)), plain())
            metrics = recorder.step_metrics(step, row_of(step), [group(step)])
            run.log("train", step, row_of(step) | metrics)
            found.append(metrics)
        run.close()
        seen.append(found)
        printed.append(output.getvalue())
    assert seen[0] == seen[1] and json.loads(json.dumps(seen[0])) == seen[0]
    assert "law/ceiling" not in seen[0][FEWEST_POINTS - 2] and "law/ceiling" in seen[0][FEWEST_POINTS - 1]
    states = [metrics["alarm/entropy_collapse"] for metrics in seen[0]]
    assert states == [0.0] * 8 + [1.0] * (steps - 8)
    (alarm,) = alarms(list(RunFolder(tmp_path / "run0", config).rows()))
    assert printed[0].count("entropy collapse") == 1 and f"step {alarm.step}: {alarm.text}" in printed[0]
    assert len({metrics["entropy/fork_threshold"] for metrics in seen[0]}) == 1


def test_forking_tokens_are_measured_against_the_first_step_that_knew_them(tmp_path):
    """A run of an older version that was resumed has rows without a threshold."""
    config = load_config(None, [*TINY, f'run_dir="{tmp_path / "run"}"'])
    run = RunFolder(tmp_path / "run", config)
    run.make()
    run.log("train", 1, row_of(1))
    recorder = Recorder(run, Display(Console(file=io.StringIO())), plain())
    found = [recorder.step_metrics(step, row_of(step), [group(step)]) for step in (2, 3, 4)]
    run.close()
    assert {metrics["entropy/fork_threshold"] for metrics in found} == {found[0]["entropy/p80"]}
    assert len({metrics["entropy/p80"] for metrics in found}) == 3


def test_what_is_not_finite_is_null_in_a_row_and_does_not_end_a_resume(tmp_path):
    trainer = begin(tmp_path / "run")
    trainer.run.make()
    trainer.step = 1
    row = row_of(1) | {"episodes": 40, "turns": 3.0, "entropy/action_mean": math.nan, "loss": math.inf}
    trainer._log("train", row | {"entropy/by_turn": [0.5, math.nan, None], "ratio/max": 2.0})
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    stored = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert stored["loss"] is None and stored["entropy/by_turn"] == [0.5, None, None] and stored["ratio/max"] == 2
    trainer._show_history()
    trainer.recorder.step_metrics(2, row_of(2), [group(2)])
    trainer.engine.close()
    trainer.run.close()


def plain():
    """An agent of the plain format, whose messages are actions as a whole."""
    from agentropy.agents.formats import PlainFormat

    from .test_bandit import TOKENIZER

    agent = Agent()
    agent.tokenizer, agent.format = TOKENIZER, PlainFormat(TOKENIZER)
    return agent


def test_an_alarm_stays_under_the_live_table():
    output = io.StringIO()
    with Display(Console(file=output, force_terminal=True, width=100, height=40)) as display:
        display.alarm("step 7: entropy collapse: fallen from 0.600 to 0.100 nats a token")
        display.status("step 8/20")
    assert "entropy collapse" in output.getvalue().splitlines()[-1]


def test_messages_of_other_formats_are_taken_apart(tmp_path):
    from .test_instruments_entropies import Letters

    run = RunFolder(tmp_path / "run", load_config(None, [*TINY, f'run_dir="{tmp_path / "run"}"']))
    run.make()
    agent = Agent()
    agent.tokenizer = Letters()
    tree = Tree("task", "train")
    words = "<think>ab</think>c"
    spread = np.linspace(0, 1, len(words), dtype=np.float32)
    leaf = tree.add(
        tree.add(-1, "prompt", [1]), "action", [*map(ord, words)], sampled=True, logprobs=-spread, entropies=spread,
        turn=0, text=words,
    )  # fmt: skip
    tree.trajectories = [Trajectory((leaf,))]
    metrics = Recorder(run, Display(Console(file=io.StringIO())), agent).step_metrics(1, row_of(1), [tree])
    assert metrics["entropy/in_thought"] == pytest.approx(7.5 / 17) and metrics["entropy/in_action"] == 1
    assert not any("in_thought" in name for name in Recorder(run, Display(), plain()).step_metrics(1, {}, [tree]))
