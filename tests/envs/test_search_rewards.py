"""Measures of answers, against the published scripts' values."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.envs.search.rewards import arpo, exact_match, f1, normalise


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Apple!", "apple"),
        ("an  apple, a pear", "apple pear"),
        ("U.S.A.", "usa"),
        ("theatre", "theatre"),
        ("Zürich", "zürich"),
        ("--", ""),
    ],
)
def test_normal_form_is_that_of_squad(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize(
    ("answer", "accepted", "matches"),
    [
        ("the October 1922.", ["October 1922"], True),
        ("october of 1922", ["October 1922"], False),
        ("NYC", ["New York City", "NYC"], True),
        ("", ["x"], False),
    ],
)
def test_exact_match(answer, accepted, matches):
    assert exact_match(answer, accepted) is matches


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        # Worked by hand from the definition of SQuAD's script: 2PR / (P + R) over word counts.
        ("October 1922", ["October 1922"], 1.0),
        ("in October 1922", ["October 1922"], 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("1922", ["October 1922"], 2 * 1 * 0.5 / 1.5),
        ("x x y", ["x y y"], 2 / 3),
        ("red", ["blue", "dark red"], 2 / 3),
        ("blue", ["red"], 0.0),
        # HotpotQA's rule.
        ("yes it is", ["yes"], 0.0),
        ("no", ["no no"], 0.0),
        ("Yes.", ["yes"], 1.0),
        ("", ["red"], 0.0),
    ],
)
def test_token_f1(answer, accepted, expected):
    assert f1(answer, accepted) == pytest.approx(expected, abs=1e-12)


@given(st.text(max_size=30), st.lists(st.text(max_size=30), min_size=1, max_size=3))
def test_f1_is_a_share_and_one_for_an_exact_match(answer, accepted):
    value = f1(answer, accepted)
    assert 0 <= value <= 1
    if exact_match(answer, accepted):
        assert value == 1


BOTH = ("search", "python")


@pytest.mark.parametrize(
    ("accuracy", "well_formed", "tools", "expected"),
    [
        # ARPO, Eq. 8: bad format -1; wrong 0; F1 .6 pays .6, and .7 with both tools; F1 0 pays 0 with both tools too.
        (0.6, False, BOTH, -1.0),
        (0.0, True, (), 0.0),
        (0.6, True, ("search",), 0.6),
        (0.6, True, ("python",), 0.6),
        (0.6, True, BOTH, 0.7),
        (0.0, True, BOTH, 0.0),
        (1.0, True, BOTH, 1.1),
    ],
)
def test_arpo_pays_as_equation_8(accuracy, well_formed, tools, expected):
    assert arpo(accuracy, well_formed, tools) == pytest.approx(expected, abs=1e-12)
