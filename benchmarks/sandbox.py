"""What the sandboxes of the tool environment cost, and whether they hold.

``python -m agentropy.benchmarks.sandbox`` measures each interpreter that this machine can confine: starting it, a call
in a fresh and in a live session, going back to an earlier point; then it tries to escape from each, checks that nothing
came of it and that the next call works, prints a table and writes JSON.

- *start*: the first call of a process, which starts a worker or a child. *Fresh*: a call after all variables were
  forgotten. *Live*: a call that uses a variable of the last one.
- *snapshot*, *restore*: taking a point of an episode of ``agentropy/Tools-v0`` after four calls, and coming back to it.
  *Next call*: the call after that, which is when a Monty worker reads its state.
- An escape attempt is blocked when the code was stopped with an error, no secret was read, no file changed, nobody was
  connected to or killed, no process was left behind, and the variables from before were still there.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..envs.tools.env import ToolsEnv
from ..envs.tools.interpreters import Interpreter, describe_sandboxes, make_interpreter
from .machine import describe_machine, summary

SECRET = "a-secret-that-no-agent-may-read"
TOKEN = "AGENTROPY_TEST_TOKEN"
_TIME_LIMIT = 1.0

# {secret} is the path of a file, {parent} the process that runs the sandbox, {port} a port somebody listens at.
ATTACKS = {
    "read a file": "open({secret!r}).read()",
    "read the password file": "open('/etc/passwd').read()",
    "write a file": "open({secret!r}, 'w').write('gone')",
    "climb out of the folder": "open('../' * 20 + {secret!r}).read()",
    "list a folder": "import os\nos.listdir('/')",
    "link to a file": "import os\nos.symlink({secret!r}, 'link')\nopen('link').read()",
    "read the environment": f"import os\nos.environ['{TOKEN}']",
    "read the environment's file": "open('/proc/self/environ').read()",
    "read the parent's environment": "open('/proc/{parent}/environ').read()",
    "read the parent's memory": "open('/proc/{parent}/mem', 'rb').read(1)",
    "trace the parent": "import ctypes\n1 / (1 + ctypes.CDLL(None).ptrace(16, {parent}, 0, 0))",
    "open a socket": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)",
    "start a program": "import subprocess\nsubprocess.run(['touch', {secret!r}])",
    "start a shell": "import os\n1 / (os.system('kill -9 {parent}') == 0)",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "leave a process behind": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "kill the parent": "import os\nos.kill({parent}, 9)",
    "kill everything": "import os\nos.kill(-1, 9)",
    "raise its own limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "memory bomb": "x = []\nwhile True:\n    x.append('y' * 100_000)",
    "one huge object": "x = 'a' * 10**10",
    "nested copies": "a = [0] * 10\nfor _ in range(12):\n    a = [a] * 10\na",
    "huge number": "9 ** 9 ** 9 ** 9",
    "endless loop": "while True:\n    pass",
    "endless loop that catches":
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
    "unlimited recursion": "def f():\n    return f()\nf()",
    "endless output": "while True:\n    print('y' * 1000)",
    "fill the disk": "i = 0\nwhile True:\n    open(f'f{{i}}', 'w').write('x' * 900_000)\n    i += 1",
    "one huge file": "open('f', 'w').write('x' * 50_000_000)",
    "forge a reply":
        "import os, sys\nf = sys._getframe(1).f_locals\nos.write(f['replies'], bytes(16) + b'\\x04\\0\\0\\0fake')",
}  # fmt: skip


def processes_below() -> set[int]:
    """Return the live processes that descend from this one."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if fields[0] not in "ZX":
                parents[int(entry.name)] = int(fields[1])
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return below - {os.getpid()}


def attack(interpreter: Interpreter, code: str) -> str:
    """Run one attack; return what came of it, or nothing if it was blocked."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        secret = Path(folder, "secret.txt")
        secret.write_text(SECRET)
        listener.settimeout(0.02)
        bystander = subprocess.Popen(["sleep", "60"])
        os.environ[TOKEN] = SECRET
        try:
            interpreter.clear()
            interpreter.run("canary = 41")
            before = processes_below()
            port = listener.getsockname()[1]
            ran = interpreter.run(code.format(secret=str(secret), parent=os.getpid(), port=port))
            checks = {
                "the code ended without an error": not ran.ok and "Error" in ran.text,
                "a secret was read": SECRET not in ran.text,
                "a file was changed": secret.read_text() == SECRET and os.listdir(folder) == [secret.name],
                "the next call did not work": interpreter.run("canary + 1").text == "42",
                "a process was killed": bystander.poll() is None,
                "a process was left behind": len(processes_below()) <= len(before) + 1,
                "a connection was made": _nobody_came(listener),
            }
        finally:
            del os.environ[TOKEN]
            bystander.kill()
            bystander.wait()
    return "; ".join(what for what, held in checks.items() if not held)


def _nobody_came(listener: socket.socket) -> bool:
    try:
        listener.accept()[0].close()
    except TimeoutError:
        return True
    return False


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    """Return milliseconds of ``rounds`` repetitions of each thing that an interpreter does."""
    times: dict[str, list[float]] = {}

    def clock(what: str, act: Callable[..., Any], *given: Any) -> Any:
        start = time.perf_counter()
        result = act(*given)
        times.setdefault(what, []).append(1000 * (time.perf_counter() - start))
        return result

    starts = max(3, min(10, rounds // 10))
    for _ in range(starts):
        interpreter = make_interpreter(name)
        clock("start", interpreter.run, "1 + 1")
        interpreter.close()
    interpreter = make_interpreter(name)
    for _ in range(rounds if name == "monty" else starts):
        interpreter.run("x = 1")
        interpreter.clear()
        clock("fresh", interpreter.run, "1 + 1")
    interpreter.run("x = 1")
    for _ in range(rounds):
        clock("live", interpreter.run, "x + 1")
    interpreter.close()

    env = ToolsEnv(interpreter=name, max_turns=1000)
    env.reset(seed=0)
    for number in range(4):
        env.step(f"<python>x{number} = list(range({number}, 100))\nlen(x{number})</python>")
    for _ in range(rounds if name == "monty" else starts):
        point = clock("snapshot", env.snapshot)
        env.step("<python>x0.append(1)</python>")
        clock("restore", env.restore, point)
        assert clock("next call", env.step, "<python>len(x0)</python>")[0] == "<result>\n100\n</result>"
        env.restore(point)
    env.close()
    return times


def timing_table(measured: dict[str, dict[str, list[float]]]) -> Table:
    """Medians in milliseconds."""
    shown = Table(title="Milliseconds (medians)", box=box.SIMPLE_HEAD)
    shown.add_column("")
    for name in measured:
        shown.add_column(name, justify="right")
    for what in next(iter(measured.values())):
        cells = [statistics.median(times[what]) for times in measured.values()]
        shown.add_row(what, *(f"{cell:.2f}" if cell < 10 else f"{cell:.0f}" for cell in cells))
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, attack, print and write."""
    parser = argparse.ArgumentParser(prog="python -m agentropy.benchmarks.sandbox", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="repetitions of what is quick")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sandbox.json")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error("expected rounds >= 1")

    console = Console()
    reports = describe_sandboxes()
    for report in reports:
        console.print(str(report), highlight=False)
    names = [report.interpreter for report in reports if report.available]
    if not names:
        parser.error("this machine can confine none of the interpreters")
    machine = describe_machine(["pydantic-monty"])
    measured = {name: measure(name, options.rounds) for name in names}
    console.print(timing_table(measured))
    escapes: dict[str, dict[str, str]] = {}
    for name in names:
        interpreter = make_interpreter(name, time_limit=_TIME_LIMIT)
        escapes[name] = {what: attack(interpreter, code) for what, code in ATTACKS.items()}
        interpreter.close()
        open_ways = {what: why for what, why in escapes[name].items() if why}
        console.print(f"{name}: {len(ATTACKS) - len(open_ways)} of {len(ATTACKS)} escape attempts blocked")
        for what, why in open_ways.items():
            console.print(f"  {what}: {why}", style="bold red")
    console.print(summary(machine), highlight=False)
    figures = {
        "machine": machine,
        "settings": {"rounds": options.rounds},
        "sandboxes": {one.interpreter: {"available": one.available, "means": one.means} for one in reports},
        "milliseconds": {
            name: {what: [round(value, 4) for value in values] for what, values in times.items()}
            for name, times in measured.items()
        },
        "escapes": escapes,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    console.print(f"all figures in {options.out}", highlight=False)


if __name__ == "__main__":
    main()
