"""The text space holds any printable text, and texts pass through shared memory unchanged and up to date."""

from copy import deepcopy

import pytest
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory, write_to_shared_memory
from hypothesis import given
from hypothesis import strategies as st

from agentropy.envs.text import TextSpace, storable

TEXTS = st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=4)


@given(texts=TEXTS, later=TEXTS)
def test_shared_memory_always_shows_what_was_written_last(texts, later):
    space = TextSpace(max_length=40)
    memory = create_shared_memory(space, n=len(texts))
    view = read_from_shared_memory(space, memory, n=len(texts))
    for index, text in enumerate(texts):
        write_to_shared_memory(space, index, text, memory)
    kept = deepcopy(view)
    assert tuple(view) == kept == tuple(texts)
    for index, text in enumerate(later[: len(texts)]):
        write_to_shared_memory(space, index, text, memory)
    assert view[: len(later)] == tuple(later[: len(texts)])
    assert kept == tuple(texts)


@pytest.mark.parametrize(
    "text", ["", "look", 'You see a mug 1.\n\nYour task is to: "look" & think {twice}~', "tab\t", "café 東京 🙂"]
)
def test_space_holds_any_text(text):
    assert TextSpace(max_length=100).contains(text)


@pytest.mark.parametrize("text", ["x" * 101, 3, None, b"look"])
def test_space_refuses_anything_else(text):
    assert not TextSpace(max_length=100).contains(text)


@given(text=st.text(alphabet=st.characters(), max_size=20))
def test_storable_texts_can_be_written_and_others_are_kept(text):
    stored = storable(text)
    assert stored.encode("utf-8").decode("utf-8") == stored
    assert len(stored) == len(text)
    assert all(
        new == old or (new == "?" and "\ud800" <= old <= "\udfff") for new, old in zip(stored, text, strict=True)
    )
