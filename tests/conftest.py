"""What every test shares: quiet threads, no network, fresh but repeatable random examples, no leaked processes.

- ``shared_data``: folder of real data sets, where this machine has them.
"""

import os

# Read by torch and transformers when they are imported, which the imports of the tests do.
os.environ["OMP_WAIT_POLICY"] = "passive"
# The whole suite runs in two processes, which else keep each other waiting.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(8, len(os.sched_getaffinity(0))) // 2)))
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import secrets
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

SESSION_MARK = "AGENTROPY_TEST_SESSION"
SEED = "AGENTROPY_TEST_SEED"
# Multiprocessing keeps these until the interpreter that started them ends.
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
GRACE_SECONDS = 5.0
LONG = frozenset(
    f"test_{name}.py"
    for name in (
        *("comparison_run", "docs_examples", "engine_conformance", "http_engine", "process_engine", "trainer"),
        *("trainer_methods", "conformance", "scienceworld_simulator", "sampling_triton", "alfworld_native"),
    )
)
"""Files of a minute and more."""

# A shell's background job ignores SIGINT, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ci", deadline=None, max_examples=50, print_blob=True)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in two processes, a file in one of them, where pytest-xdist is installed.

    Half of the time goes by in waiting for processes that tests start. ``-n 0`` runs it in one, and so does a choice of
    files, of tests or of a debugger.
    """
    options = config.option
    if hasattr(config, "workerinput") or getattr(options, "numprocesses", 0) is not None:
        return  # one of the two processes, no pytest-xdist, or a number was given
    chosen = config.args_source is not pytest.Config.ArgsSource.TESTPATHS or options.keyword
    if not chosen and not options.usepdb and not options.collectonly:
        options.numprocesses, options.dist = 2, "loadfile"
        # In our order: by default files with few tests come last, and these are the long ones.
        options.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long files first, so that no process works on one of them when the other is done."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give hypothesis a fresh seed and the profile "ci", unless the command line chose others."""
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("ci")
    if config.getoption("--hypothesis-seed") is None:
        # In the environment, so that all processes of a run have the same.
        config.option.hypothesis_seed = os.environ.setdefault(SEED, str(secrets.randbelow(2**32)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the seed that repeats this run's random examples."""
    terminalreporter.write_line(f"random examples: pytest --hypothesis-seed={config.option.hypothesis_seed}")


@pytest.fixture(scope="session")
def shared_data(pytestconfig: pytest.Config) -> Path:
    """Return ``$AGENTROPY_SHARED_DATA``, else ``../shared/data`` beside the repository; skip when absent."""
    default = pytestconfig.rootpath.parent / "shared" / "data"
    folder = Path(os.environ.get("AGENTROPY_SHARED_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; AGENTROPY_SHARED_DATA names the folder")
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_leaked_processes() -> Iterator[None]:
    """Fail the session when a process that a test started outlives it, even one that lost its parent."""
    mark = secrets.token_hex(8)
    os.environ[SESSION_MARK] = mark
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    while (leaked := list(_started_here(mark))) and time.monotonic() < deadline:
        time.sleep(0.1)
    if leaked:
        pytest.fail("processes outlived the tests:\n" + "\n".join(leaked), pytrace=False)


def _started_here(mark: str) -> Iterator[str]:
    """Yield the command of each live process that descends from this one or carries its mark."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    marked: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue  # it has just ended, or is another user's
        if fields[0] in "ZX":
            continue
        pid = int(entry.name)
        parents[pid], commands[pid] = int(fields[1]), command
        if f"{SESSION_MARK}={mark}".encode() in environment.split(b"\0"):
            marked.add(pid)
    here = os.getpid()
    for pid, parent in parents.items():
        ancestor = parent
        while ancestor in parents and ancestor != here:
            ancestor = parents[ancestor]
        helper = parent == here and any(name in commands[pid] for name in HELPERS)
        if pid != here and (pid in marked or ancestor == here) and not helper:
            yield f"{pid}: {commands[pid]}"
