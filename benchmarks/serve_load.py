"""Load test of the environment server: many clients, each with a session, while processes are killed.

Run ``python -m agentropy.benchmarks.serve_load --sessions 256 --kills 2``. Every session plays real ALFWorld episodes
with ``recover=True``, partly the expert's way. Meanwhile worker processes and the server itself are killed in turn, and
the server is started again. Each episode must then equal, word for word, the same one played in this process; at the
end the server must have no session left, neither of clients that closed nor of clients that vanished. Rates and
latencies are measured without kills, in msgpack and in JSON, by clients that share this process and the machine's
cores with the server.

- ``ServerProcess``: the server as its users start it.
- ``Player``, ``play``: one session's episodes. ``load``: all at once. ``main``: the command line.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from ..envs.pool import usable_cores
from .machine import describe_machine, summary

WORLD = "agentropy/ALFWorld-v0"
REMOTE = "agentropy/Remote-v0"
IDLE_SECONDS = 20.0
EXPERT_SHARE = 0.7
"""Of the actions; the others are random admissible commands."""
VANISHING = 16
"""Clients that are killed with an open session, and sockets left in the middle of a request."""


class ServerProcess:
    """``agentropy serve envs`` in a process of its own, which can be killed and started again at the same port."""

    def __init__(self, sessions: int, workers: int) -> None:
        """Start it."""
        self._options = ["--max-sessions", str(sessions), "--workers", str(workers), "--env", WORLD]
        self._options += ["--idle-seconds", str(IDLE_SECONDS)]
        self.url = ""
        self.start()

    def start(self) -> None:
        """Start it, at the port that it had."""
        port = self.url.rpartition(":")[2] or "0"
        command = [sys.executable, "-m", "agentropy.envs.serve", "--port", port, *self._options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("on "):
                self.url = line.split()[1]
                return
        raise RuntimeError(f"the server did not start: exit code {self.process.wait()}")

    def workers(self) -> list[int]:
        """The pids of the server's processes."""
        return [pid for pid, parent in _parents() if parent == self.process.pid]

    def kill_worker(self) -> None:
        """Kill one of its processes."""
        os.kill(self.workers()[0], signal.SIGKILL)

    def kill(self) -> list[int]:
        """Kill the server itself; return the pids of the processes that it had."""
        workers = self.workers()
        self.process.kill()
        self.process.wait()
        return workers

    def sessions(self) -> int:
        """How many sessions it has."""
        return httpx.get(f"{self.url}/health", trust_env=False, timeout=60).json()["sessions"]

    def stop(self) -> int:
        """End it with SIGTERM; return its exit code."""
        self.process.terminate()
        return self.process.wait(60)


def _parents() -> list[tuple[int, int]]:
    """Every living process and its parent."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            found.append((int(stat.parent.name), int(parent)))
    return found


@dataclass(slots=True)
class Played:
    """What one session or several did. Times are seconds."""

    digests: dict[tuple[int, int], str] = field(default_factory=dict)
    """Of everything that an episode showed, by session and number."""
    latencies: list[float] = field(default_factory=list)
    won: int = 0
    recoveries: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.latencies)

    def add(self, other: Played) -> None:
        """Count ``other`` in."""
        self.digests |= other.digests
        self.latencies += other.latencies
        self.won += other.won
        self.recoveries += other.recoveries
        self.failures += other.failures


def play(env: Any, session: int, episodes: int, tell: Callable[[], None] = lambda: None) -> Played:
    """Play the episodes of one session; they depend on its number alone.

    Args:
        env: a client, or the environment itself.
        session: its number.
        episodes: how many.
        tell: called after each.
    """
    played = Played()
    for number in range(episodes):
        choice = random.Random(f"{session} {number}")
        shown = hashlib.sha256()
        observation, info = env.reset(seed=session if number == 0 else None)
        done = False
        while True:
            shown.update(json.dumps([observation, info], sort_keys=True).encode())
            if done:
                break
            action = info["expert"]
            if action is None or choice.random() > EXPERT_SHARE:
                action = choice.choice(info["admissible"])
            start = time.perf_counter()
            observation, reward, terminated, truncated, info = env.step(action)
            played.latencies.append(time.perf_counter() - start)
            done = terminated or truncated
            shown.update(json.dumps([reward, terminated, truncated]).encode())
        played.digests[session, number] = shown.hexdigest()
        played.won += info["won"]
        tell()
    return played


def world(steps: int) -> dict[str, Any]:
    """The arguments of the environment."""
    return {"max_turns": steps, "expert_info": True}


def load(
    server: ServerProcess, sessions: int, episodes: int, steps: int, form: str, kills: Sequence[Callable[[], Any]] = ()
) -> Played:
    """Play in ``sessions`` sessions at once; ``kills`` happen at equal parts of all episodes."""
    total = Played()
    lock = threading.Lock()
    finished = threading.Semaphore(0)

    def run(session: int) -> None:
        env = gymnasium.make(
            REMOTE,
            url=server.url,
            env_id=WORLD,
            env_kwargs=world(steps),
            recover=True,
            message_format=form,
            timeout=300.0,
            disable_env_checker=True,
        )
        try:
            played = play(env, session, episodes, finished.release)
        except Exception as error:
            played = Played(failures=[f"session {session}: {type(error).__name__}: {error}"])
            finished.release(episodes)
        played.recoveries = env.unwrapped.recoveries  # type: ignore[attr-defined]
        env.close()
        with lock:
            total.add(played)

    threads = [threading.Thread(target=run, args=(session,)) for session in range(sessions)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for kill in kills:
        for _ in range(sessions * episodes // (len(kills) + 1)):
            finished.acquire()
        kill()
    for thread in threads:
        thread.join()
    total.seconds = time.perf_counter() - start
    return total


def plan_kills(server: ServerProcess, kills: int, orphans: list[int]) -> list[Callable[[], Any]]:
    """Return what to kill: in turn a worker, and the server, which is started again."""

    def kill_server() -> None:
        orphans.extend(server.kill())
        server.start()

    return [server.kill_worker if number % 2 == 0 else kill_server for number in range(kills)]


def vanish(server: ServerProcess) -> int:
    """Let clients die with open sessions and half a request sent; return how many sessions that left at once."""
    code = (
        "import gymnasium, sys, time\n"
        f"envs = [gymnasium.make({REMOTE!r}, url={server.url!r}, env_id={WORLD!r}) for _ in range({VANISHING})]\n"
        "for env in envs: env.reset(seed=0)\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    client = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    client.stdout.readline()
    host, port = server.url.removeprefix("http://").split(":")
    sockets = [socket.create_connection((host, int(port))) for _ in range(VANISHING)]
    for connection in sockets:
        connection.sendall(b"PUT /v1/sessions/0123 HTTP/1.1\r\nContent-Length: 10\r\n")
    left = server.sessions()
    client.kill()
    client.wait()
    client.stdout.close()
    _until(lambda: server.sessions() == 0, 3 * IDLE_SECONDS)
    for connection in sockets:
        connection.close()
    return left


def _tell(progress: str) -> None:
    Console(stderr=True).print(progress, style="dim", highlight=False)


def _until(happened: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.1)


def measure(
    sessions: int, kills: int, episodes: int, steps: int, workers: int, formats: Sequence[str]
) -> dict[str, Any]:
    """Run everything; return the report, without the machine."""
    server = ServerProcess(sessions + 2 * VANISHING, workers)
    orphans: list[int] = []
    try:
        killed = load(server, sessions, episodes, steps, "msgpack", plan_kills(server, kills, orphans))
        _tell(f"{len(killed.digests)} episodes played with {kills} kills in {killed.seconds:.0f} s")
        _until(lambda: server.sessions() == 0, 10.0)
        after_kills = server.sessions()
        rates: dict[str, dict[str, Any]] = {}
        for form in formats:
            for count in (1, sessions):
                load(server, count, 1, steps, form)  # nothing is new to any process
                played = load(server, count, max(1, episodes // 2) if count > 1 else 8 * episodes, steps, form)
                rates[f"{form}, {count} session{'s' if count > 1 else ''}"] = figures(played)
                _tell(f"{len(played.digests)} episodes played in {form} in {played.seconds:.0f} s")
        vanished = vanish(server)
        leaked = server.sessions()
        pids = server.workers()
    finally:
        code = server.stop()
    local = Played()
    env = gymnasium.make(WORLD, **world(steps), disable_env_checker=True)
    for session in range(sessions):
        local.add(play(env, session, episodes))
    different = sum(killed.digests.get(key) != digest for key, digest in local.digests.items())
    alive = {pid for pid, _ in _parents()}
    return {
        "kills": {
            **figures(killed),
            "episodes": len(local.digests),
            "lost_or_different": different,
            "failures": killed.failures,
            "recoveries": killed.recoveries,
            "won": killed.won,
            "sessions_left": after_kills,
        },
        "rates": rates,
        "local_steps_per_second": local.steps / sum(local.latencies),
        "vanished_clients": {"sessions_open": vanished, "sessions_left": leaked},
        "server_exit_code": code,
        "processes_left": len(alive.intersection(orphans + pids)),
    }


def figures(played: Played) -> dict[str, float]:
    """Steps per second of all sessions together, and percentiles of one step's latency in milliseconds."""
    cuts = statistics.quantiles(played.latencies, n=100, method="inclusive")
    percentiles = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(played.latencies)}
    return {
        "steps": played.steps,
        "seconds": played.seconds,
        "steps_per_second": played.steps / played.seconds,
        **{f"latency_ms_{name}": 1e3 * value for name, value in percentiles.items()},
    }


def table(report: dict[str, Any]) -> Table:
    """Rates and latencies, those under kills first."""
    shown = Table(title="Environments over HTTP", box=box.SIMPLE_HEAD)
    shown.add_column("")
    for heading in ("steps/s", "p50 ms", "p95 ms", "p99 ms", "max ms"):
        shown.add_column(heading, justify="right", no_wrap=True)
    rows = {"with kills, msgpack": report["kills"], **report["rates"]}
    for name, row in rows.items():
        cells = [row["steps_per_second"], *(row[f"latency_ms_{name}"] for name in ("p50", "p95", "p99", "max"))]
        shown.add_row(name, *(f"{cell:,.0f}" if cell >= 100 else f"{cell:.2g}" for cell in cells))
    return shown


def succeeded(report: dict[str, Any]) -> bool:
    """Whether nothing was lost, doubled or leaked."""
    kills, vanished = report["kills"], report["vanished_clients"]
    wrong = [kills["lost_or_different"], kills["sessions_left"], vanished["sessions_left"], report["processes_left"]]
    return not any([*wrong, *kills["failures"], report["server_exit_code"]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the load test, print and write; return 1 if anything was lost, doubled or leaked."""
    parser = argparse.ArgumentParser(prog="python -m agentropy.benchmarks.serve_load", description=main.__doc__)
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--kills", type=int, default=2, help="in turn a worker and the server itself")
    parser.add_argument("--episodes", type=int, default=4, help="of each session")
    parser.add_argument("--steps", type=int, default=30, help="longest episode")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes of the server's pool")
    parser.add_argument("--formats", nargs="*", default=["msgpack", "json"], help="to take rates and latencies of")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serve_load.json")
    options = parser.parse_args(arguments)
    if min(options.sessions, options.episodes, options.steps, options.workers) < 1 or options.kills < 0:
        parser.error("expected sessions, episodes, steps and workers >= 1, and kills >= 0")
    machine = describe_machine(["gymnasium", "fastapi", "uvicorn", "httptools", "uvloop", "httpx", "msgpack"])
    start = time.perf_counter()
    names = ("sessions", "kills", "episodes", "steps", "workers", "formats")
    settings = {name: getattr(options, name) for name in names}
    report = {"machine": machine, "settings": settings, **measure(**settings)}
    report["seconds"] = round(time.perf_counter() - start, 1)
    kills, vanished = report["kills"], report["vanished_clients"]
    console = Console()
    console.print(table(report))
    console.print(
        f"{kills['episodes']} episodes in {options.sessions} sessions at once, {options.kills} kills: "
        f"{kills['lost_or_different']} lost or different, {kills['recoveries']} brought back, {kills['won']} won\n"
        f"{vanished['sessions_open']} sessions of clients that were killed: {vanished['sessions_left']} left after "
        f"{IDLE_SECONDS:g} s idle; {report['processes_left']} processes left\n{summary(machine)}",
        highlight=False,
    )
    for failure, count in collections.Counter(kills["failures"]).most_common(5):
        console.print(f"{count} × {failure}", style="red", highlight=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"figures and machine in {options.out}", highlight=False)
    return 0 if succeeded(report) else 1


if __name__ == "__main__":
    sys.exit(main())
