"""Registers ``Obedient-v0``, a small text world for the pool's tests: it does what it is told, also the worst."""

from __future__ import annotations

import os
import signal
import string
import subprocess
import time
from typing import Any

import gymnasium

HOARD: list[bytearray] = []
"""What the action ``grow`` leaves behind in the process."""


class TooMuchError(RuntimeError):
    """Raised by the action ``raise``."""


class ObedientEnv(gymnasium.Env[str, str]):
    """Observations tell the task, the turn and a number drawn from the environment's own generator."""

    observation_space = gymnasium.spaces.Text(1000, charset=string.printable)
    action_space = gymnasium.spaces.Text(1000, charset=string.printable)

    def __init__(self, fault: str | None = None) -> None:
        if fault is not None:
            self._do(fault)
        self._task, self._turn = "", 0

    def tasks(self, split: str | None = None) -> tuple[str, ...]:
        if split not in (None, "train"):
            raise KeyError(split)
        return ("a", "b", "c")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._task, self._turn = (options or {}).get("task", "none"), 0
        if self._task.startswith("!"):
            self._do(self._task[1:])
        return self._observe()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._turn += 1
        self._do(action)
        observation, info = self._observe()
        if action == "lambda":
            info["bad"] = lambda: None
        return observation, 1.0, action == "end", False, info

    def snapshot(self) -> tuple[str, int, dict[str, Any]]:
        return self._task, self._turn, self.np_random.bit_generator.state

    def restore(self, state: tuple[str, int, dict[str, Any]]) -> None:
        self._task, self._turn, self.np_random.bit_generator.state = state

    def admissible(self) -> tuple[str, ...]:
        return "end", f"turn {self._turn}"

    def close(self) -> None:
        if log := os.environ.get("OBEDIENT_CLOSED"):
            with open(log, "a") as file:
                file.write("closed\n")

    def _observe(self) -> tuple[str, dict[str, Any]]:
        drawn = self.np_random.integers(1 << 30)
        return f"{self._task} {self._turn} {drawn}", {"task": self._task, "pid": os.getpid()}

    def _do(self, action: str) -> None:
        match action.split():
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["exit"]:
                os._exit(3)
            case ["segv"]:
                os.kill(os.getpid(), signal.SIGSEGV)
            case ["hang"]:
                while True:
                    pass
            case ["raise"]:
                raise TooMuchError("that was too much")
            case ["child"]:
                subprocess.Popen(["sleep", "1000"])
            case ["grow", megabytes]:
                HOARD.append(bytearray(int(megabytes) << 20))
            case ["print"]:
                print("a world that prints")


class ForgetfulEnv(ObedientEnv):
    """Has neither tasks nor snapshots."""

    tasks = snapshot = restore = admissible = property()  # type: ignore[assignment]


gymnasium.register("Obedient-v0", entry_point=ObedientEnv)
gymnasium.register("Forgetful-v0", entry_point=ForgetfulEnv)
