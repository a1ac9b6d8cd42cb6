"""Entropies of trees: by turn, place, kind of token and outcome; forking tokens; diversity of groups."""

from __future__ import annotations

import json
import math
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.agents.tree import Trajectory, Tree
from agentropy.algorithms.instruments.entropies import HEAD_TOKENS, entropy_metrics, token_table
from agentropy.algorithms.instruments.groups import actions_of, canonical, group_metrics, shannon
from agentropy.algorithms.instruments.kinds import Kind, TokenKinds, _closing, kind_metrics, kinds


def act(tree, parent, text, entropies, turn, logprobs=None, tokens=None):
    entropies = np.asarray(entropies, np.float32)
    return tree.add(
        parent,
        "action",
        range(10, 10 + len(entropies)) if tokens is None else tokens,
        sampled=True,
        logprobs=-entropies if logprobs is None else logprobs,
        entropies=entropies,
        turn=turn,
        text=text,
    )


def see(tree, parent, text, turn):
    return tree.add(parent, "observation", [1, 2], turn=turn, text=text)


def forked():
    """Two episodes that share their first turn; the first is won. Their second actions have five and two tokens."""
    tree = Tree("task", "train")
    prompt = tree.add(-1, "prompt", [1], text="a room")
    first = act(tree, prompt, "go  North", [1.0, 2.0], 0)
    shared = see(tree, first, "a hall", 0)
    won = act(tree, shared, "take key", [0.5, 0.4, 0.3, 0.2, 0.1], 1)
    lost = act(tree, shared, "drop key", [3.0, 1.0], 1)
    tree.trajectories = [Trajectory((won,), won=True, score=1.0, turns=2), Trajectory((lost,), turns=2)]
    return tree


def metrics_of(*trees, **options):
    return entropy_metrics(token_table(trees), **options)


def test_every_token_of_a_tree_counts_once():
    table = token_table([forked()])
    assert table.entropy == pytest.approx([1, 2, 0.5, 0.4, 0.3, 0.2, 0.1, 3, 1])
    assert table.turn.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert table.position.tolist() == [0, 1, 0, 1, 2, 3, 4, 0, 1]
    assert table.length.tolist() == [2, 2, 5, 5, 5, 5, 5, 2, 2]
    assert table.won.tolist() == [True] * 7 + [False] * 2
    assert table.lost.tolist() == [True] * 2 + [False] * 5 + [True] * 2


def test_tokens_of_episodes_whose_world_failed_are_neither_won_nor_lost():
    tree = forked()
    leaf = act(tree, 0, "look", [9.0], 0)
    tree.trajectories.append(Trajectory((leaf,), failed=True))
    table = token_table([tree])
    assert (table.entropy[-1], table.won[-1], table.lost[-1]) == (9, False, False)
    assert metrics_of(tree)["entropy/lost"] == metrics_of(forked())["entropy/lost"]


def test_golden_splits_of_a_small_tree():
    metrics = metrics_of(forked())
    assert metrics["entropy/by_turn"] == pytest.approx([1.5, 5.5 / 7], abs=1e-6)
    assert metrics["entropy/by_position"] == pytest.approx([1.5, 3.4 / 3, 0.3, 0.2, 0.1], abs=1e-6)
    # Of five tokens the first two stand after the observation, of two the first one; the first turn answers none.
    assert metrics["entropy/after_observation"] == pytest.approx((0.5 + 0.4 + 3) / 3)
    assert metrics["entropy/later"] == pytest.approx((0.3 + 0.2 + 0.1 + 1) / 4)
    assert metrics["entropy/won"] == pytest.approx(4.5 / 7)
    assert metrics["entropy/lost"] == pytest.approx(7 / 4)
    assert metrics["entropy/consistency"] == pytest.approx(0, abs=1e-7)  # -log p is H in this tree


def test_no_more_than_the_first_tokens_of_a_long_action_stand_after_the_observation():
    tree = Tree("task", "train")
    node = act(tree, see(tree, act(tree, tree.add(-1, "prompt", [1]), "a", [0.0], 0), "seen", 0), "b", range(400), 1)
    tree.trajectories = [Trajectory((node,))]
    assert metrics_of(tree)["entropy/after_observation"] == np.mean(range(HEAD_TOKENS))


def test_turns_that_nobody_reached_are_none_and_late_ones_are_left_out():
    tree = Tree("task", "train")
    prompt = tree.add(-1, "prompt", [1])
    for turn in (0, 2, 1000):
        act(tree, prompt, "x", [1.0 + turn], turn)
    assert metrics_of(tree)["entropy/by_turn"] == [1.0, None, 3.0]


def test_forking_tokens_are_measured_against_the_first_step():
    def step(entropies, tokens):
        tree = Tree("task", "train")
        act(tree, tree.add(-1, "prompt", [1]), "x", entropies, 0, tokens=tokens)
        return tree

    first = metrics_of(step([0.1, 0.2, 0.3, 0.4, 2.0, 0.1, 0.2, 0.3, 0.4, 3.0], [0, 1, 2, 3, 7, 0, 1, 2, 3, 9]))
    assert first["entropy/fork_share"] == pytest.approx(0.2) and first["entropy/fork_tokens"] == [7, 9]
    assert first["entropy/fork_overlap"] == 1 and first["entropy/p80"] == first["entropy/fork_threshold"]
    later = metrics_of(step([0.1, 0.1, 0.1, 2.5], [7, 7, 7, 9]), first=first)
    assert later["entropy/fork_threshold"] == first["entropy/fork_threshold"]
    assert later["entropy/fork_share"] == 0.25 and later["entropy/fork_overlap"] == 0.5
    assert later["entropy/p80"] == pytest.approx(np.quantile([0.1, 0.1, 0.1, 2.5], 0.8))
    wider = metrics_of(step([0.1, 0.8, 0.9, 2.5], [1, 7, 8, 9]), first=first)
    assert wider["entropy/fork_share"] == 0.75 and wider["entropy/fork_tokens"] == [7, 8, 9]


def test_consistency_tells_samples_of_the_distribution_from_others():
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.ones(12), 4000)
    entropies = -(chances * np.log(chances)).sum(1)

    def score(choose):
        tree = Tree("task", "train")
        drawn = [choose(row) for row in chances]
        logs = np.log(chances[np.arange(len(chances)), drawn])
        act(tree, tree.add(-1, "prompt", [1]), "x", entropies, 0, logprobs=logs, tokens=drawn)
        return metrics_of(tree)

    tree = Tree("task", "train")
    act(tree, tree.add(-1, "prompt", [1]), "x", [0.0, 0.0, 0.0], 0, logprobs=[-1.0, -2.0, -6.0])
    metrics = metrics_of(tree)
    assert metrics["entropy/consistency"] == 3  # standard deviation √7, of three
    assert metrics["entropy/consistency_z"] == pytest.approx(3 / math.sqrt(7 / 3))
    honest, greedy = score(lambda row: rng.choice(12, p=row)), score(np.argmax)
    assert abs(honest["entropy/consistency_z"]) < 3 and greedy["entropy/consistency_z"] < -30
    assert "entropy/consistency" not in entropy_metrics(token_table([forked()]), exact=False)


def test_neither_the_order_of_trees_nor_that_of_branches_matters():
    rng = np.random.default_rng(1)
    trees = []
    for _ in range(6):
        tree = forked()
        for node in tree.nodes:
            if node.sampled:
                node.entropies = rng.exponential(size=len(node.tokens)).astype(np.float32)
        trees.append(tree)
    expected = metrics_of(*trees)
    random.Random(0).shuffle(trees)
    for name, value in metrics_of(*trees).items():
        assert value == pytest.approx(expected[name], abs=1e-6), name


def test_nothing_sampled_has_no_metrics():
    tree = Tree("task", "train")
    tree.add(-1, "prompt", [1])
    assert metrics_of(tree) == {} and metrics_of() == {} and kind_metrics([tree], TokenKinds(Letters())) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Go   to\ndesk 1 ", "go to desk 1"),
        ("<think>first\nthe key</think><action>take  Key</action>", "take key"),
        ("it opened the thought</think> take key", "take key"),
        ("<action>one</action><action>two", "two"),
        ("<think>cut off", ""),
        ("<search>Rosa  Selenfel</search>", "<search>rosa selenfel</search>"),
        ("Hm, so <search>Rosa</search> then\n<b>x</b>?", "<search>rosa</search> <b>x</b>"),
        ("I say <search>Rosa", "<search>rosa"),
    ],
)
def test_canonical_actions(text, expected):
    assert canonical(text) == expected


@given(st.lists(st.sampled_from(["<think>", "</think>", "<action>", "</action>", " Take", "it\n", "<b"]), max_size=9))
def test_what_stands_before_the_last_end_of_a_thought_or_behind_a_beginning_does_not_count(parts):
    text = "".join(parts)
    plain = re.sub(r".*</think>|<think>.*", " ", text, flags=re.DOTALL)  # quadratic in the length of the text
    found = re.findall(r"<action>(.*?)(?:</action>|\Z)", plain, re.DOTALL)
    assert canonical(text) == " ".join((found[-1] if found else plain).split()).lower()


def test_messages_of_ten_thousand_tokens_are_read_once():
    """Each of these takes minutes where every character is looked at from every other one."""
    words = "word " * 60_000
    assert canonical(words) == words.strip()
    assert canonical("<think>" * 40_000) == "" and canonical("<a>" * 60_000) == "<a>" * 60_000
    for text in ("a" * 300_000, "1" * 300_000 + "(", "f(x) " * 60_000, "((" * 100_000, "a.b(" * 75_000):
        assert len(kinds([text[:1], text[1:]])) == 2


@given(st.text("ab_.1( ,)'", max_size=24))
def test_arguments_of_calls_stand_behind_a_name(text):
    """Against an expression that finds the first name with a parenthesis from every place anew."""
    expected, place = np.full(len(text), Kind.ACTION), 0
    while found := re.compile(r"[A-Za-z_][\w.]*\(").search(text, place):
        stop = _closing(text, found.end() - 1, len(text))
        expected[found.end() : stop - 1] = Kind.ARGUMENT
        place = max(stop, found.end())
    blank = [sign.isspace() for sign in text]
    assert [k for k, b in zip(kinds(list(text)), blank, strict=True) if not b] == [
        k for k, b in zip(expected, blank, strict=True) if not b
    ]


def test_tokens_without_a_known_entropy_do_not_count():
    """An engine behind a server may not tell the entropy of every token."""
    tree, whole = forked(), forked()
    leaf = act(tree, 2, "look", [math.nan, 5.0], 1, logprobs=[math.nan, -5.0])
    other = act(whole, 2, "look", [5.0], 1)
    for each, node in ((tree, leaf), (whole, other)):
        each.trajectories.append(Trajectory((node,), turns=2))
    found, expected = metrics_of(tree), metrics_of(whole)
    for name in ("entropy/by_turn", "entropy/lost", "entropy/fork_threshold", "entropy/p80", "entropy/consistency"):
        assert found[name] == pytest.approx(expected[name], abs=1e-6), name
    json.dumps([found, kind_metrics([tree], TokenKinds(Letters()))], allow_nan=False)
    unknown = Tree("task", "train")
    act(unknown, unknown.add(-1, "prompt", [1]), "x", [math.nan], 0)
    assert metrics_of(unknown) == {} and not any("entropy" in n for n in kind_metrics([unknown], TokenKinds(Letters())))


@given(st.lists(st.integers(0, 4), max_size=30))
def test_shannon_entropy_is_that_of_the_frequencies(items):
    counts = np.bincount(items) if items else np.zeros(1)
    shares = counts[counts > 0] / max(1, len(items))
    assert shannon(items) == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-12)
    assert 0 <= shannon(items) <= math.log(5) + 1e-12


def test_golden_diversity_of_groups():
    def group(*episodes):
        tree = Tree("task", "train")
        prompt = tree.add(-1, "prompt", [1], text="room")
        for won, *texts in episodes:
            node, leaf = prompt, prompt
            for turn, text in enumerate(texts):
                leaf = act(tree, node, text, [1.0], turn)
                node = see(tree, leaf, f"after {text.lower()}", turn)
            tree.trajectories.append(Trajectory((leaf,), won=won, score=float(won)))
        tree.trajectories.append(Trajectory((), failed=True))
        return tree

    one = group((True, "A", "b"), (True, "a", "B"), (False, "c", "b"), (False, "c", "d"))
    metrics = group_metrics([one])
    half, quarter = math.log(2), math.log(4)
    assert metrics["group/unique"] == 3 / 4
    assert metrics["group/sequence_entropy"] == pytest.approx((half + quarter) / 2)
    assert metrics["group/answer_entropy"] == pytest.approx(shannon("bbbd"))
    assert metrics["group/outcome_entropy"] == pytest.approx(half)
    assert metrics["group/state_entropy"] == pytest.approx(half)  # a room and what follows the first action
    assert (metrics["group/solved"], metrics["group/mastered"]) == (1, 0)
    other = group((True, "a"), (True, "a"))
    both = group_metrics([one, other, group()])
    assert both["group/unique"] == (3 / 4 + 1 / 2) / 2 and both["group/mastered"] == 0.5
    assert group_metrics([other])["group/sequence_entropy"] == 0 and group_metrics([group()]) == {}


def test_the_actions_of_a_window_trajectory_come_from_all_its_leaves():
    tree = Tree("task", "train")
    leaves = [act(tree, tree.add(-1, "prompt", [1]), text, [1.0], turn) for turn, text in enumerate("abc")]
    trajectory = Trajectory((leaves[2], leaves[0], leaves[1]))
    assert [node.text for node in actions_of(tree, trajectory)] == ["a", "b", "c"]


T, A, G, F = Kind.THOUGHT, Kind.ACTION, Kind.ARGUMENT, Kind.FORM
MARKS = {T: "t", A: "a", G: "g", F: "f"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("go to desk 1", "aaaaaaaaaaaa"),
        ("<think>hm</think> <action>go</action>", "f" * 7 + "tt" + "f" * 8 + "f" + "f" * 8 + "aa" + "f" * 9),
        ("hm</think>go", "tt" + "f" * 8 + "aa"),
        ("<think>cut", "f" * 7 + "ttt"),
        ("so <action>go", "ttt" + "f" * 8 + "aa"),
        ("<python>1+1</python>", "a" * 8 + "ggg" + "f" * 9),
        ("ls(a='x)')", "aaa" + "gggggg" + "a"),
        ("[f(1), g(2)]", "aaa" + "g" + "aaaaa" + "g" + "aa"),
        (
            '<tool_call>{"name": "ls", "arguments": {"a": "}"}}</tool_call>',
            "f" * 11 + "a" * 28 + "g" * 10 + "a" + "f" * 12,
        ),
    ],
)
def test_kinds_of_characters(text, expected):
    assert "".join(MARKS[kind] for kind in kinds(list(text))) == expected


def test_a_token_is_of_the_kind_of_its_first_visible_character():
    assert kinds(["<think", ">so", " it", " is</th", "ink", ">\n", "go", " on", ""]).tolist() == [
        F,
        F,
        T,
        T,
        F,
        F,
        A,
        A,
        F,
    ]


class Letters:
    """A tokenizer whose token is a character's code, and 0 an end token."""

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(chr(token) for token in token_ids if token)


def test_entropy_of_the_kinds_of_tokens():
    tree = Tree("task", "train")
    text = "<think>ab</think>c"
    tokens = [*map(ord, text), 0]
    spread = [0.1] * 7 + [2.0, 4.0] + [0.1] * 8 + [1.0, 0.1]
    act(tree, tree.add(-1, "prompt", [1]), text, spread, 0, tokens=tokens)
    metrics = kind_metrics([tree], TokenKinds(Letters()))
    assert metrics["entropy/in_thought"] == 3 and metrics["entropy/in_action"] == 1
    assert metrics["entropy/in_form"] == pytest.approx(0.1) and "entropy/in_argument" not in metrics
    shares = [metrics[f"tokens/share_{kind.name.lower()}"] for kind in Kind]
    assert shares == pytest.approx([2 / 19, 1 / 19, 0, 16 / 19])
