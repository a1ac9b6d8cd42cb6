"""Claims about messages: every value comes back as it was, and no bytes do harm."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentropy.envs.serve import wire
from agentropy.errors import UsageError

pytest.importorskip("msgpack")

FORMS = [wire.MSGPACK, wire.JSON]
texts = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates too
atoms = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary()
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(texts | st.integers() | st.just("$tuple"), inner)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equality that tells types apart and takes NaN for itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("form", FORMS)
@given(value=values)
def test_every_value_comes_back_as_it_was(form: str, value: Any) -> None:
    assert same(wire.decode(wire.encode(value, form), form), value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "value", [{"$ref": "#/x"}, {"$tuple": [1]}, {"$dict": []}, {"a": 1, "$b": 2}, {1: "x", (2, 3): "y"}, -0.0, 1 << 80]
)
def test_dictionaries_that_look_like_tags_are_only_dictionaries(form: str, value: Any) -> None:
    assert same(wire.decode(wire.encode(value, form), form), value)


@pytest.mark.parametrize("form", FORMS)
def test_numpy_values_travel(form: str) -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    got = wire.decode(wire.encode({"a": array, "n": np.float32(0.5), "b": np.True_}, form), form)
    assert got["a"].dtype == array.dtype and np.array_equal(got["a"], array)
    assert got["n"] == 0.5 and got["b"] is True


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [object(), {1, 2}, np.array([object()]), lambda: None])
def test_what_cannot_be_sent_is_refused(form: str, value: Any) -> None:
    with pytest.raises(wire.WireError, match="cannot be sent"):
        wire.encode([value], form)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(form: str, data: bytes) -> None:
    with contextlib.suppress(UsageError):
        wire.decode(data, form)


@pytest.mark.parametrize(
    ("form", "data"),
    [
        (wire.JSON, b"[" * 200_000),
        (wire.MSGPACK, b"\x91" * 200_000),
        (wire.JSON, b'{"$array": ["O", [1], "AAAAAAAAAAA="]}'),
        (wire.JSON, b'{"$array": ["<i8", [9], "AA=="]}'),
        (wire.JSON, b'{"$bytes": "no base64!"}'),
        (wire.JSON, b'{"$dict": [[[1], 2]]}'),
        (wire.MSGPACK, b"\xdd\xff\xff\xff\xff"),
        (wire.MSGPACK, b"\xc1"),
        (wire.JSON, b'{"$float": 1' + b"0" * 400 + b"}"),
        (wire.JSON, b'{"$int": "' + b"9" * 5000 + b'"}'),
        (wire.JSON, b'{"$array": ["i8,(", [1], ""]}'),
    ],
)
def test_hostile_bytes_are_refused(form: str, data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(data, form)


@given(seed=st.integers(0, 1 << 70))
def test_a_generator_goes_on_where_it_was(seed: int) -> None:
    generator = np.random.default_rng(seed)
    generator.integers(10, size=7, dtype=np.int32)
    text = wire.dump_generator(generator)
    assert text is not None
    again = wire.load_generator(text)
    assert generator.integers(1 << 40, size=9).tolist() == again.integers(1 << 40, size=9).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"bit_generator": "os"}',
        '{"bit_generator": "PCG64", "state": 3, "has_uint32": 0}',
        json.dumps(np.random.Philox(1).state, default=np.ndarray.tolist),
    ],
)
def test_a_bad_state_of_a_generator_is_refused(text: str) -> None:
    with pytest.raises(wire.WireError):
        wire.load_generator(text)


def test_only_gymnasiums_kind_of_generator_is_sent() -> None:
    with pytest.raises(wire.WireError, match="MT19937"):
        wire.dump_generator(np.random.Generator(np.random.MT19937(1)))


def test_the_hash_tells_any_difference_of_what_was_shown() -> None:
    shown = [("a", 0.0, False, False), ("a", 1.0, False, False), ("a", 0.0, True, False), ("a", 0.0, False, True)]
    assert len({wire.link(b"", *moved) for moved in [*shown, ("b", 0.0, False, False)]}) == 5
    assert wire.link(b"x", *shown[0]) != wire.link(b"", *shown[0])


def test_a_problem_is_json_for_people_and_programs() -> None:
    assert json.loads(wire.problem(409, wire.Code.BUSY, "wait")) == {
        "title": "Busy",
        "status": 409,
        "code": "busy",
        "detail": "wait",
    }
