"""Checkpoints: model weights that `transformers` can load, and all state that changes learning.

- ``save_checkpoint``: write ``<name>/`` whole or not at all, then drop the oldest ones.
- ``load_state``: the state that was saved. ``latest_checkpoint``: the newest folder. ``checkpoint_of``: a run's.

A checkpoint folder holds the model and tokenizer as ``save_pretrained`` writes them, ``state.json`` (plain
values and the shape of the state) and ``state.safetensors`` (its tensors). Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError

FORMAT_VERSION = 1


def save_checkpoint(
    parent: Path,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write ``parent/name`` and keep the ``keep`` newest checkpoints (by name, which must sort by age).

    The folder is filled under a hidden name and renamed, so a kill leaves either the old set or the new one.
    """
    target, temporary = parent / name, parent / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    tensors: dict[str, torch.Tensor] = {}
    plain = {"version": FORMAT_VERSION, "state": _pack(state, tensors)}
    save_file(tensors, temporary / "state.safetensors")
    (temporary / "state.json").write_text(json.dumps(plain), encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        _fsync(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)
    _fsync(parent)
    for old in _complete(parent)[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(parent: Path) -> Path | None:
    """The newest complete checkpoint under ``parent``, or None."""
    complete = _complete(parent)
    return complete[-1] if complete else None


def checkpoint_of(path: str | Path) -> Path:
    """The newest checkpoint of a run folder, or the checkpoint folder that ``path`` is itself.

    Raises:
        UsageError: it is neither.
    """
    folder = Path(path)
    found = latest_checkpoint(folder / "checkpoints") if (folder / "checkpoints").is_dir() else folder
    if found is None or not (found / "config.json").is_file():
        raise UsageError(f"'{path}' is no checkpoint, and no run that has one; expected a folder of either")
    return found


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The state saved in ``checkpoint``; tensors are on the CPU.

    Raises:
        UsageError: not a checkpoint, or one of a newer format.
    """
    try:
        plain = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(checkpoint / "state.safetensors")
    except OSError as error:
        raise UsageError(f"'{checkpoint}' is not a checkpoint: {error}") from error
    if plain["version"] > FORMAT_VERSION:
        raise UsageError(f"'{checkpoint}' has format {plain['version']}; this version reads up to {FORMAT_VERSION}")
    state = _unpack(plain["state"], tensors)
    assert isinstance(state, dict)
    return state


def _complete(parent: Path) -> list[Path]:
    return sorted(path for path in parent.glob("[!.]*") if (path / "state.json").is_file())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray):
        key = f"t{len(tensors):05d}"
        array = isinstance(value, np.ndarray)
        # A fresh copy: safetensors refuses tensors that share memory.
        tensors[key] = torch.as_tensor(value).detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"array" if array else "tensor": key}
    if isinstance(value, dict):
        # Keys of optimiser state are integers, which JSON objects cannot hold.
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, tensors) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "dict":
            return {key: _unpack(item, tensors) for key, item in content}
        return tensors[content].numpy() if kind == "array" else tensors[content]
    return value
