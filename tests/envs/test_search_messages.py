"""What an agent's messages are read as."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.envs.search.messages import EXPECTED, Answer, Invalid, Search, parse


@pytest.mark.parametrize(
    ("message", "read"),
    [
        ("<search>Halenfel</search>", Search("Halenfel", True)),
        (" <search> Halenfel </search>\n", Search("Halenfel", True)),
        ("<answer>1871</answer>", Answer("1871", True)),
        ("<think>First the author.</think>\n<search>The Silent Orchard</search>", Search("The Silent Orchard", True)),
        # A chat template has written the opening tag.
        ("First the author.</think><search>The Silent Orchard</search>", Search("The Silent Orchard", True)),
        # What stands in a thought is no action.
        ("<think>I could <answer>guess</answer></think><search>Halenfel</search>", Search("Halenfel", True)),
        # Read, but not well formed.
        ("It is <answer>1871</answer>.", Answer("1871", False)),
        ("<search>Halenfel", Search("Halenfel", False)),
        ("<search>one</search><search>two</search>", Search("one", False)),
        ("<search>one</search> <answer>two</answer>", Search("one", False)),
        ("<answer>two</answer><search>one</search>", Answer("two", False)),
        ("<think>a</think><think>b</think><search>c</search>", Search("c", False)),
        ("<search>c</search><think>a</think>", Search("c", False)),
        ("<think>never closed <search>Halenfel</search>", Search("Halenfel", False)),
        ("<search><search>x</search></search>", Search("<search>x", False)),
    ],
)
def test_the_first_action_outside_thoughts_counts(message, read):
    assert parse(message) == read


@pytest.mark.parametrize(
    "message",
    ["", "Halenfel", "<think>hm</think>", "<SEARCH>x</SEARCH>", "</search>", "<think><search>x</search></think>"],
)
def test_anything_else_is_told_how_to_write(message):
    assert parse(message) == Invalid(EXPECTED)


@pytest.mark.parametrize("message", ["<search></search>", "<answer> \n</answer>", "<search>", "<search> </search>x"])
def test_empty_actions_are_invalid(message):
    read = parse(message)
    assert isinstance(read, Invalid) and read.feedback.endswith(EXPECTED) and read.feedback != EXPECTED


TAGS = [f"<{slash}{name}>" for name in ("think", "search", "answer") for slash in ("", "/")]


@given(st.lists(st.sampled_from([*TAGS, "a", " ", "é", "\ud800"]), max_size=12).map("".join))
def test_whatever_is_written_is_read_and_never_raises(message):
    read = parse(message)
    if not isinstance(read, Invalid):
        content = read.query if isinstance(read, Search) else read.text
        assert content and content == content.strip()


@given(
    thought=st.none() | st.text(string.ascii_letters + " .\n", max_size=20),
    content=st.text(string.ascii_letters + string.digits, min_size=1, max_size=20),
    name=st.sampled_from(["search", "answer"]),
)
def test_the_asked_form_is_well_formed(thought, content, name):
    before = "" if thought is None else f"<think>{thought}</think>\n"
    kind = Search if name == "search" else Answer
    assert parse(f"{before}<{name}>{content}</{name}>") == kind(content, True)


def test_a_message_of_nothing_but_tags_is_read_in_linear_time():
    # A backtracking expression would need hours for this one.
    assert isinstance(parse("<think>" * 200_000), Invalid)
    assert isinstance(parse("<search>" * 200_000), Search)
