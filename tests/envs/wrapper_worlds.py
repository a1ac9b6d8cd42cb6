"""Two small worlds for the tests of wrappers: ``Sums`` is played over turns, ``Quiz`` ends with one answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import gymnasium

from agentropy.envs.world import Info, Turn, World


class Sums(World):
    """Reach a sum with ``add N``. An invalid action leaves a trace, so that one that was not taken back shows."""

    splits = ("train", "test")
    has_expert = True
    instructions = "Actions are: add N."

    def __init__(self, split: str = "train", *, max_turns: int = 8, **kwargs: Any) -> None:
        super().__init__(split, max_turns=max_turns, **kwargs)

    def _list(self, split: str) -> Iterable[str]:
        return (f"{split}-{target}" for target in range(5, 30))

    def _begin(self, split: str, task: str) -> str:
        self._target = int(task.split("-")[1])
        self._sum = self._traces = 0
        return f"Reach {self._target}."

    def _act(self, action: str) -> Turn:
        words = action.split()
        if len(words) != 2 or words[0] != "add" or words[1] not in map(str, range(1, 10)):
            self._traces += 1
            return Turn(f"What is {action[:40]!r}?", -0.5, invalid=True)
        self._sum += int(words[1])
        over = self._sum >= self._target
        return Turn(f"{'é' * self._sum} {self._sum}, {self._traces} traces", self._sum / 8, over=over)

    def _report(self) -> Info:
        won = self._sum == self._target
        return {"goal": f"reach {self._target}", "won": won, "score": float(won), "traces": self._traces}

    def _expert_action(self) -> str | None:
        left = self._target - self._sum
        return f"add {min(9, left)}" if left > 0 else None


class Quiz(World):
    """One question, one answer; the last observation and ``info`` tell the right one."""

    splits = ("train",)
    has_expert = True

    def __init__(self, *, max_turns: int = 1, expert_info: bool = False, render_mode: str | None = None) -> None:
        super().__init__("train", max_turns=max_turns, expert_info=expert_info, render_mode=render_mode)

    def _list(self, split: str) -> Iterable[str]:
        return (f"{a}+{b}" for a in range(2, 9) for b in range(2, 9))

    def _begin(self, split: str, task: str) -> str:
        self._right = str(sum(map(int, task.split("+"))))
        self._won = False
        return f"What is {task.replace('+', ' plus ')}?"

    def _act(self, action: str) -> Turn:
        self._won = action.strip() == self._right
        return Turn(f"The answer is {self._right}.", float(self._won), over=True)

    def _report(self) -> Info:
        return {"goal": "answer", "won": self._won, "score": float(self._won), "answer": self._right}

    def _expert_action(self) -> str | None:
        return self._right


def hint(attempt: Any) -> str:
    """A teacher that knows the answer and sometimes says it."""
    right, said = int(attempt.info["answer"]), attempt.actions[-1]
    if said == "tell":
        return f"It is {right}."
    return "Higher." if said.isdecimal() and int(said) < right else "Lower."


gymnasium.register("Sums-v0", entry_point=Sums)
gymnasium.register("Quiz-v0", entry_point=Quiz)
