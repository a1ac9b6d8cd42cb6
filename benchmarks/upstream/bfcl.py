"""BFCL as its own package plays and checks it.

- ``Upstream``: ``execute_multi_turn_func_call`` for each message, ``multi_turn_checker`` in the end.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import bfcl_eval
from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils
from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_FOLDER = Path(bfcl_eval.__file__).parent / "data"
_episodes = itertools.count()


class Upstream:
    """The inference loop of the package's ``BaseHandler``, decoding as its handler for Qwen does."""

    def __init__(self) -> None:
        """Read nothing yet."""
        self._entries: dict[str, tuple[list[Any], list[Any]]] = {}
        self._entry: dict[str, Any] = {}
        self._gold: list[list[str]] = []
        self._calls: list[list[list[str]]] = []
        self._model = ""
        self.observation = ""
        """What the last call of ``reset`` or ``step`` led to."""
        self.valid = False
        """The benchmark's verdict on the last episode."""

    def reset(self, task: str) -> None:
        """Start ``task``."""
        category, _, number = task.partition("/")
        if category not in self._entries:
            name = f"BFCL_v4_multi_turn_{category}.json"
            self._entries[category] = _read(_FOLDER / name), _read(_FOLDER / "possible_answer" / name)
        entries, answers = self._entries[category]
        self._entry, self._gold = entries[int(number)], answers[int(number)]["ground_truth"]
        self._forget()
        self._model = f"model{next(_episodes)}"
        self._calls = [[]]
        self._execute([])
        self.observation = self._message()

    def step(self, action: str) -> bool:
        """Play one message; return whether the episode is over."""
        calls = []
        for text in _CALL.findall(action):
            call = json.loads(text)
            calls.append(f"{call['name']}({','.join(f'{k}={v!r}' for k, v in call['arguments'].items())})")
        if calls:
            self._calls[-1].append(calls)
            self.observation = "\n".join(self._execute(calls))
            return False
        if len(self._calls) < len(self._gold):
            self._calls.append([])
            self.observation = self._message()
            return False
        checked = multi_turn_checker(self._calls, self._gold, self._entry, "", self._model)
        self.valid = checked["valid"]
        return True

    def close(self) -> None:
        """Free the simulators, which the package keeps for ever."""
        self._forget()

    def _execute(self, calls: list[str]) -> list[str]:
        results: list[str]
        results, _ = multi_turn_utils.execute_multi_turn_func_call(
            calls,
            self._entry["initial_config"],
            self._entry["involved_classes"],
            self._model,
            self._entry["id"],
            long_context="long_context" in self._entry["id"],
        )
        return results

    def _message(self) -> str:
        turn = self._entry["question"][len(self._calls) - 1]
        return turn[0]["content"] if turn else "I have updated some more functions you can choose from. What about now?"

    def _forget(self) -> None:
        for name in [name for name in vars(multi_turn_utils) if self._model and name.startswith(self._model + "_")]:
            delattr(multi_turn_utils, name)


def _read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
