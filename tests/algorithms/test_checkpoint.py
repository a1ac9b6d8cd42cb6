"""Checkpoints hold any state exactly, and are there whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentropy.agents.models import build_small_model, load_model
from agentropy.agents.tokenizer import build_word_tokenizer
from agentropy.algorithms.checkpoint import latest_checkpoint, load_state, save_checkpoint
from agentropy.errors import UsageError

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
states = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.one_of(st.text(), st.integers()), inner)),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def parts() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    tokenizer = build_word_tokenizer(["go to fridge 1"])
    return build_small_model(len(tokenizer), hidden=16, layers=1, heads=2, intermediate=16, seed=0), tokenizer


@given(state=states)
def test_any_state_of_plain_values_comes_back_equal(state: Any) -> None:
    from agentropy.algorithms.checkpoint import _pack, _unpack

    assert _unpack(_pack(state, {}), {}) == state


def test_tensors_of_every_kind_come_back_bit_for_bit(parts: tuple[Any, Any], tmp_path: Path) -> None:
    shared = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state = {
        "optimizer": {"state": {0: {"exp_avg": shared, "step": torch.tensor(3.0)}, 1: {"exp_avg": shared.T}}},
        "half": torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
        "history": np.array([0.1, 0.2]),
        "empty": torch.empty(0, 4),
    }
    loaded = load_state(save_checkpoint(tmp_path, "step-000001", *parts, state, keep=1))
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], shared)
    assert torch.equal(loaded["optimizer"]["state"][1]["exp_avg"], shared.T)
    assert torch.equal(loaded["half"], state["half"]) and loaded["half"].dtype == torch.bfloat16
    assert isinstance(loaded["history"], np.ndarray) and (loaded["history"] == state["history"]).all()
    assert loaded["empty"].shape == (0, 4)


def test_the_model_of_a_checkpoint_loads_with_transformers(parts: tuple[Any, Any], tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, "step-000001", *parts, {}, keep=1)
    model, tokenizer = load_model(str(path))
    for name, value in parts[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert tokenizer.get_vocab() == parts[1].get_vocab()


def test_only_the_newest_are_kept_and_half_written_ones_do_not_count(parts: tuple[Any, Any], tmp_path: Path) -> None:
    for name in ("sft-000025", "step-000000", "step-000001", "step-000002"):
        save_checkpoint(tmp_path, name, *parts, {"name": name}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
    # What a kill in the middle of writing leaves behind:
    (tmp_path / ".step-000003.tmp").mkdir()
    (tmp_path / ".step-000003.tmp" / "state.json").write_text("{")
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and newest.name == "step-000002"
    save_checkpoint(tmp_path, "step-000003", *parts, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]


def test_what_is_no_checkpoint_or_too_new_is_refused(parts: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a checkpoint"):
        load_state(tmp_path)
    path = save_checkpoint(tmp_path, "step-000001", *parts, {}, keep=1)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"version": 1', '"version": 99'))
    with pytest.raises(UsageError, match="format 99"):
        load_state(path)
