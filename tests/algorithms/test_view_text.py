"""A drawn tree says everything once: who shared what, where episodes forked and why, and how each ended."""

from __future__ import annotations

import io
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms.runs import RunFolder
from agentropy.algorithms.view.text import draw, load_trees, show
from agentropy.config import load_config
from agentropy.errors import UsageError


def play(tree: Tree, parent: int, *said: str, turn: int = 0, entropy: float = 0.5, reward: float = 0.0) -> int:
    """Append actions and observations in turn, an action first; a token a word, each with the same entropy."""
    for number, text in enumerate(said):
        words = len(text.split())
        if number % 2:
            parent = tree.add(parent, "observation", range(words), turn=turn, text=text)
            turn += 1
        else:
            floats = {"logprobs": [-1.0] * words, "entropies": [entropy] * words}
            heard = {"turn": turn, "reward": reward, "text": text}
            parent = tree.add(parent, "action", range(words), sampled=True, **heard, **floats)
    return parent


def ended(leaf: int, **fields: Any) -> Trajectory:
    return Trajectory((leaf,), **fields)


def decision(turn: int, delta: float, probability: float, forks: int) -> dict[str, Any]:
    return {"turn": turn, "delta_entropy": delta, "probability": probability, "forks": forks}


def left(parent: int, turn: int, delta: float, probability: float) -> dict[str, Any]:
    return {"parent": parent, "turn": turn, "delta_entropy": delta, "probability": probability}


def text_of(tree: Tree, width: int = 80, *, terminal: bool = False, **options: Any) -> str:
    file = io.StringIO()
    colours = "truecolor" if terminal else None
    console = Console(file=file, width=width, force_terminal=terminal, color_system=colours, highlight=False)
    console.print(draw(tree, **options))
    return file.getvalue()


def lines_of(tree: Tree, width: int = 80, **options: Any) -> list[str]:
    return [line.rstrip() for line in text_of(tree, width, **options).splitlines()]


def body(text: str) -> list[str]:
    return textwrap.dedent(text).strip("\n").splitlines()


def rows_of(tree: Tree, width: int = 80, **options: Any) -> list[str]:
    """What stands between header and footer, from its first column on."""
    lines = lines_of(tree, width, **options)
    first, last = (number for number, line in enumerate(lines) if not line)
    return body("\n".join(lines[first + 1 : last]))


def mug() -> Tree:
    """Two episodes of one task. Two more leave the first: one after the first turn, and from that one another."""
    tree = Tree("put-mug-on-desk", "train")
    start = tree.add(-1, "prompt", range(20), text="You are in a room.\n\nYour task is to: put a mug on the desk.")
    shelf = play(tree, start, "go to shelf", "You see a mug.", entropy=0.2)
    take = play(tree, shelf, "take mug", "You have it.", turn=1, entropy=0.9, reward=0.5)
    won = play(tree, take, "put mug on desk", turn=2, entropy=0.1, reward=1.0)
    look = play(tree, shelf, "look", "A mug, still.", turn=1, entropy=0.4)
    late = play(tree, look, "take mug", "You have it.", "go to desk", turn=2, entropy=0.3)
    sleep = play(tree, look, "sleep", turn=2, entropy=0.7)
    lamp = play(tree, start, "go to lamp", "Nothing there.", "wait", entropy=0.6, reward=-0.1)
    tree.trajectories = [
        ended(won, reward=1.5, won=True, turns=3, info={"branching": [decision(1, 0.7, 0.64, 1)]}),
        ended(lamp, reward=-0.2, turns=2, info={"branching": [decision(1, 0.0, 0.5, 0)]}),
        ended(
            late,
            turns=4,
            truncated=True,
            info={"fork": left(0, 1, 0.7, 0.64), "branching": [decision(2, 0.1, 0.52, 1), decision(3, -0.1, 0.48, 0)]},
        ),
        ended(sleep, turns=3, info={"fork": left(2, 2, 0.1, 0.52)}),
    ]
    return tree


MUG = """
put-mug-on-desk  train, step 7
4 trajectories, 2 forks, 15 nodes, 55 tokens for the 133 of all walks: sharing
saves 59 %

    ● You are in a room.
    │ Your task is to: put a mug on the desk.
    ├─╮ #0
  0 │ │ go to shelf                                H 0.20
    │ │   You see a mug.
    │ ├─╮ ⑂ #2 leaves #0  ΔH +0.70  P 0.64  threshold 0.5
  1 │ │ │ look                                     H 0.40
    │ │ │   A mug, still.
    │ │ ├─╮ ⑂ #3 leaves #2  ΔH +0.10  P 0.52  threshold 0.5
  2 │ │ │ │ sleep                                  H 0.70
    │ │ │ ╰ ✗ lost  return 0.00  #3
  2 │ │ │ take mug                                 H 0.30  ΔH +0.10 ⑂ 1
    │ │ │   You have it.
  3 │ │ │ go to desk                               H 0.30  ΔH -0.10
    │ │ ╰ … truncated  return 0.00  #2
  1 │ │ take mug                                   H 0.90  ΔH +0.70 ⑂ 1  r +0.50
    │ │   You have it.
  2 │ │ put mug on desk                            H 0.10                r +1.00
    │ ╰ ✓ won  return 1.50  #0
    ╰─╮ #1
  0   │ go to lamp                                 H 0.60                r -0.10
      │   Nothing there.
  1   │ wait                                       H 0.60  ΔH +0.00      r -0.10
      ╰ ✗ lost  return -0.20  #1

mean ΔH +0.40 at 2 decisions that forked, ΔH -0.05 at 2 decisions that did not
fork
H mean entropy of an action's tokens in nats, ΔH its rise as the rule measures
it, ⑂ forks
"""


def test_a_forked_tree_is_drawn_with_every_decision_beside_the_entropy_it_was_made_on() -> None:
    assert lines_of(mug(), title="step 7", rule="threshold 0.5") == body(MUG)


def test_a_straight_run_stays_in_one_line_whatever_its_length() -> None:
    tree = Tree("corridor", "train")
    start = tree.add(-1, "prompt", [1], text="A corridor.")
    leaf = play(tree, start, *["go on", "More corridor."] * 120, "stop")
    tree.trajectories = [ended(leaf, won=True, reward=1.0)]
    rows = rows_of(tree)
    assert len(rows) == 243
    assert rows[0] == "    ● A corridor." and rows[-1] == "    ╰ ✓ won  return 1.00  #0"
    assert {row.index("│") for row in rows[1:-1]} == {4}
    assert rows[1].startswith("  0 │ go on") and rows[-2].startswith("120 │ stop")


def test_a_line_with_many_forks_stays_where_it_is_and_only_what_leaves_it_is_indented() -> None:
    tree = Tree("corridor", "train")
    start = tree.add(-1, "prompt", [1], text="A corridor.")
    trunk, forked = start, []
    for turn in range(15):
        trunk = play(tree, trunk, f"step {turn}", "More corridor.", turn=turn)
        forked.append((turn + 1, play(tree, trunk, f"turn back at {turn}", turn=turn + 1)))
    leaf = play(tree, trunk, "stop", turn=15)
    tree.trajectories = [ended(leaf)] + [ended(end, info={"fork": left(0, turn, 0.3, 0.6)}) for turn, end in forked]
    lines = lines_of(tree)
    assert "16 trajectories, 15 forks" in lines[1]
    for turn in range(15):
        assert any(line.startswith(f"{turn:>3} │ step {turn} ") for line in lines)
        assert any(line.startswith(f"{turn + 1:>3} │ │ turn back at {turn} ") for line in lines)


def test_where_nothing_was_noted_the_later_episode_leaves_the_earlier() -> None:
    tree = Tree("room", "train")
    start = tree.add(-1, "prompt", [1], text="A room.")
    door = play(tree, start, "open door", "It is open.")
    tree.trajectories = [ended(play(tree, door, said, turn=1)) for said in ("go on", "go back")]
    drawn = [row.partition("  H 0")[0].rstrip() for row in rows_of(tree)]
    assert drawn == body("""
            ● A room.
          0 │ open door
            │   It is open.
            ├─╮ ⑂ #1
          1 │ │ go back
            │ ╰ ✗ lost  return 0.00  #1
          1 │ go on
            ╰ ✗ lost  return 0.00  #0
    """)


def test_independent_episodes_stand_side_by_side_under_their_prompt() -> None:
    tree = Tree("room", "train")
    start = tree.add(-1, "prompt", range(10), text="A room.")
    tree.trajectories = [ended(play(tree, start, f"play {name}"), reward=1.0) for name in ("first", "second", "third")]
    expected = """
        room  train
        3 trajectories, 0 forks, 4 nodes, 16 tokens for the 36 of all walks: sharing
        saves 56 %

            ● A room.
            ├─╮ #0
          0 │ │ play first                                                        H 0.50
            │ ╰ ✗ lost  return 1.00  #0
            ├─╮ #1
          0 │ │ play second                                                       H 0.50
            │ ╰ ✗ lost  return 1.00  #1
            ╰─╮ #2
          0   │ play third                                                        H 0.50
              ╰ ✗ lost  return 1.00  #2

        H mean entropy of an action's tokens in nats
    """
    assert lines_of(tree) == body(expected)


def test_in_window_context_the_turns_of_an_episode_make_one_line() -> None:
    tree = Tree("room", "train")

    def turn(number: int, seen: str, said: str) -> int:
        prompt = next((n.index for n in tree.nodes if n.text == seen), None)
        if prompt is None:
            prompt = tree.add(-1, "prompt", range(4), text=seen)
        return play(tree, prompt, said, turn=number)

    shared = (turn(0, "A room.", "open door"), turn(1, "A hall.", "go on"))
    tree.trajectories = [
        Trajectory((*shared, turn(2, "A garden.", "rest")), won=True),
        Trajectory((*shared, turn(2, "A garden.", "dig")), info={"fork": left(0, 2, 0.2, 0.6)}),
    ]
    drawn = [row.partition("  H 0")[0].rstrip() for row in rows_of(tree)]
    assert drawn == body("""
            ● A room.
          0 │ open door
            │   A hall.
          1 │ go on
            │   A garden.
            ├─╮ ⑂ #1 leaves #0  ΔH +0.20  P 0.60
          2 │ │ dig
            │ ╰ ✗ lost  return 0.00  #1
          2 │ rest
            ╰ ✓ won  return 0.00  #0
    """)
    # Without sharing, the two episodes would have read every turn's prompt and action for themselves.
    assert "18 tokens for the 34 of all walks" in " ".join(lines_of(tree))


def test_every_node_of_a_random_tree_is_drawn_once() -> None:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for _ in range(30):
        tree = Tree("task", "train")
        start = tree.add(-1, "prompt", range(3), text="here")
        observations = {start: 0}
        for number in range(int(rng.integers(1, 40))):
            parent = int(rng.choice(list(observations)))
            turn = observations[parent]
            end = play(tree, parent, f"do-{number}", f"seen-{number}", turn=turn)
            observations[end] = turn + 1
        actions = [node for node in tree.nodes if node.role == "action"]
        tree.trajectories = [ended(node.index) for node in actions]
        lines = lines_of(tree, int(rng.integers(60, 200)))
        drawn = re.findall(r"do-\d+", "\n".join(lines))
        assert sorted(drawn) == sorted(node.text for node in actions)
        assert sum("return" in line for line in lines) == len(actions)
        forks = sum(max(0, len(tree.children(n.index)) - 1) for n in tree.nodes if n.role == "observation")
        assert f", {forks} fork{'s' * (forks != 1)}, " in lines[1]
        assert sum("⑂ #" in line for line in lines) == forks
        for line in lines:  # and it stands at its own turn
            if found := re.search(r"do-(\d+)", line):
                assert int(line.split()[0]) == next(n.turn for n in actions if n.text == found[0])


def test_episodes_that_end_at_one_place_are_counted_there() -> None:
    tree = Tree("room", "train")
    start = tree.add(-1, "prompt", range(4), text="A room.")
    look = play(tree, start, "look", "A mug.")
    tree.add(look, "action", [1], turn=1, text="take mug")
    last = len(tree.nodes) - 1
    tree.trajectories = [
        ended(last, reward=1.0, won=True),
        ended(last, reward=1.0, won=True),
        ended(last, reward=0.5, truncated=True, info={"overflow": True}),
        # A fork whose world broke before it said anything ends where its parent went on.
        ended(look - 1, failed=True, info={"fork": left(0, 1, 0.4, 0.6)}),
        Trajectory((), failed=True),
    ]
    assert rows_of(tree) == body("""
            ● A room.
          0 │ look                                                                H 0.50
            ├ ! failed  return 0.00  #3
            │   A mug.
          1 │ take mug
            ├ ✓ won ×2  return 1.00  #0 #1
            ╰ … truncated by a full context  return 0.50  #2
            ! failed  return 0.00  #4, without an action
    """)


def test_turns_beyond_the_depth_are_counted_and_their_ends_kept() -> None:
    assert rows_of(mug(), depth=1) == body("""
            ● You are in a room.
            │ Your task is to: put a mug on the desk.
            ├─╮ #0
          0 │ │ go to shelf                                              H 0.20
            │ │   You see a mug.
            │ ├─╮ ⑂ #2 leaves #0  ΔH +0.70  P 0.64
            │ │ ┆ 4 turns and 1 fork more
            │ │ ├ … truncated  return 0.00  #2
            │ │ ╰ ✗ lost  return 0.00  #3
            │ ┆ 2 turns more
            │ ╰ ✓ won  return 1.50  #0
            ╰─╮ #1
          0   │ go to lamp                                               H 0.60  r -0.10
              │   Nothing there.
              ┆ 1 turn more
              ╰ ✗ lost  return -0.20  #1
    """)
    assert lines_of(mug(), depth=1)[-4:] == lines_of(mug())[-4:]
    assert not any("│ go" in row for row in rows_of(mug(), depth=0))


def test_small_rises_keep_their_digits() -> None:
    tree = mug()
    for trajectory in tree.trajectories:
        for record in [*trajectory.info.get("branching", []), trajectory.info.get("fork", {"delta_entropy": 0})]:
            record["delta_entropy"] /= 100
    assert "ΔH +0.0070 ⑂ 1" in text_of(tree) and "mean ΔH +0.0040" in text_of(tree)
    for trajectory in tree.trajectories:
        for record in trajectory.info.get("branching", []):
            record["delta_entropy"] /= 1000
        trajectory.info.pop("fork", None)
    assert "ΔH +7.0e-06 ⑂ 1" in text_of(tree)


@pytest.mark.parametrize("width", [10, 30, 60, 100])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    tree = mug()
    long = play(tree, 0, "say 長い文 " * 40, "and so on " * 50, "wait")
    tree.trajectories.append(ended(long, failed=True, info={"error": "broken " * 30}))
    chain = long - 1
    for turn in range(2, 40):  # each child forks again
        chain = play(tree, chain, f"fork {turn}", "Nothing.", turn=turn)
        parent = len(tree.trajectories) - 1
        info = {"fork": left(parent, turn - 1, 0.1, 0.5)} if turn > 2 else {}
        tree.trajectories.append(ended(play(tree, chain, "wait", turn=turn + 1), info=info))
    console = Console(width=width)
    lines = text_of(tree, width, title="step 1", rule="threshold 0.5").splitlines()
    assert max(console.measure(line).maximum for line in lines) <= width
    if width >= 60:
        assert any("ΔH +0.70 ⑂ 1  r +0.50" in line for line in lines)
        assert any("P 0.64" in line for line in lines)
        assert any(line.endswith("…") for line in lines)


def test_children_of_children_keep_room_for_their_words_and_give_up_the_figures() -> None:
    tree = Tree("corridor", "train")
    place = tree.add(-1, "prompt", [1], text="A corridor.")
    for turn in range(22):
        stays = play(tree, place, f"stay in {turn}", turn=turn, reward=0.1)
        fork = {"fork": left(turn - 1, turn - 1, 0.3, 0.6)} if turn else {}
        info = {"branching": [decision(turn, 0.3, 0.6, 1)], **fork}
        tree.trajectories.append(ended(stays, info=info))
        place = play(tree, place, f"leave {turn}", "More corridor.", turn=turn, reward=0.1)
    narrow, wide = lines_of(tree, 60), lines_of(tree, 120)
    assert all(any(f"│ leave {turn}" in line for line in narrow) for turn in range(21))
    assert next(line for line in narrow if "│ stay in 0" in line).endswith("H 0.50  ΔH +0.30 ⑂ 1  r +0.10")
    assert next(line for line in wide if "│ stay in 21" in line).endswith("H 0.50  ΔH +0.30 ⑂ 1  r +0.10")


def test_colours_are_for_terminals_and_a_rise_stands_out() -> None:
    assert "\x1b" not in text_of(mug())
    shown = text_of(mug(), terminal=True)
    assert "\x1b[33mΔH +0.70" in shown and "\x1b[33mΔH -0.10" not in shown and "\x1b[33mΔH +0.00" not in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == text_of(mug())


def test_what_a_model_says_cannot_move_the_cursor_and_its_reasoning_is_left_out() -> None:
    tree = Tree("room", "train")
    start = tree.add(-1, "prompt", [1], text="A room. [bold]No markup.[/bold]")
    said = "<think>Let me see:\n<action>look</action>?\nNo.</think>\n<action>\x1b[2Jgo\nto\tshelf</action>"
    leaf = play(tree, start, said, "Seen \x1b[31m\x07red\u202e.", "", "Nothing happens.", "[red]wait")
    tree.trajectories = [ended(leaf)]
    rows = rows_of(tree)
    assert rows[:5] == body("""
            ● A room. [bold]No markup.[/bold]
          0 │ [2Jgo to shelf                                                      H 0.50
            │   Seen [31m red .
          1 │ (no words)
            │   Nothing happens.
    """)
    assert rows[5].startswith("2 │ [red]wait")


def saved(folder: Path, *overrides: str, steps: tuple[int, ...] = (1, 12)) -> RunFolder:
    """A run that has saved a tree without forks, and one with, in every step."""
    run = RunFolder(folder, load_config(overrides=overrides))
    run.make()
    plain = Tree("find-a-lamp", "train")
    start = plain.add(-1, "prompt", [1], text="A room.")
    plain.trajectories = [ended(play(plain, start, "look")), ended(play(plain, start, "wait"))]
    for step in steps:
        run.save_trees(step, [plain, mug()])
    return run


def test_a_run_shows_its_newest_step_and_the_tree_with_the_most_forks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = saved(tmp_path, "algorithm.name=arpo", "algorithm.overrides={tau = 0.25}")
    assert load_trees(run)[0] == 12
    show(run)
    shown = capsys.readouterr().out
    assert "put-mug-on-desk  train, step 12, tree 1 of 2" in shown
    assert "⑂ #2 leaves #0  ΔH +0.70  P 0.64  threshold 0.25" in shown
    expected = text_of(mug(), title="step 12, tree 1 of 2", rule="threshold 0.25")
    assert shown == expected
    for named in ("0", "find-a-lamp"):
        show(run, step=1, task=named)
        assert "find-a-lamp  train, step 1, tree 0 of 2" in capsys.readouterr().out
    run.save_trees(13, [mug(), mug()])
    show(run)
    assert "step 13, tree 0 of 2" in capsys.readouterr().out
    rolled = saved(tmp_path / "other", "algorithm.name=arpo", "algorithm.overrides={rule = 'bernoulli'}")
    show(rolled, depth=1)
    assert "P 0.64  bernoulli" in capsys.readouterr().out
    show(saved(tmp_path / "grpo", "algorithm.name=grpo", "algorithm.overrides={}"), task="0")
    assert "0 forks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 9}, "no trajectories of step 9; the nearest step is 12"),
        ({"task": "find-a-lmp"}, "did you mean 'find-a-lamp'"),
        ({"task": "2"}, "expected 0 to 1"),
        ({"depth": -1}, "--depth is -1"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        show(saved(tmp_path), **options)


def test_a_run_without_readable_trajectories_says_so(tmp_path: Path) -> None:
    run = saved(tmp_path, steps=())
    with pytest.raises(UsageError, match="holds no trajectories yet"):
        show(run)
    run.save_trees(1, [])
    with pytest.raises(UsageError, match="is empty"):
        show(run)
    run.save_trees(2, [mug()])
    path = next((tmp_path / "trajectories").glob("step-000002*.gz"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match="cannot read"):
        show(run)
