"""The benchmark's files come from an installed package or from the index, and only with the right content."""

import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from agentropy.envs.bfcl import source
from agentropy.errors import MissingDependencyError

HERE = source.locate()
if HERE is None:
    pytest.skip("needs the files of bfcl-eval: `agentropy data bfcl`", allow_module_level=True)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a wheel of the files at hand; no package is installed, and the cache is empty."""
    path = tmp_path / f"bfcl_eval-{source.VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("bfcl_eval/not_needed.py", "raise AssertionError")
        for name in source.FILES:
            archive.write(HERE / name, f"bfcl_eval/{name}")
    monkeypatch.setenv("AGENTROPY_CACHE", str(tmp_path / "cache"))
    find = source.importlib.util.find_spec
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None if name == "bfcl_eval" else find(name))
    monkeypatch.setattr(source, "_WHEEL", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def index(monkeypatch: pytest.MonkeyPatch, *wheels: Path, status: int = 0, said: str = "") -> list[list[str]]:
    """Let pip "download" ``wheels``; return the commands that will have been run."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        for path in wheels:
            shutil.copy(path, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, status, "", said)

    monkeypatch.setattr(source.subprocess, "run", run)
    return commands


def leftovers() -> list[str]:
    return sorted(path.name for path in source._target().parent.iterdir())


def test_files_are_fetched_once_and_only_those_that_are_read(wheel, monkeypatch):
    commands = index(monkeypatch, wheel)
    assert source.locate() is None
    folder = source.source()
    assert source.source() == source.fetch() == source.locate() == folder
    assert len(commands) == 1 and commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", f"bfcl-eval=={source.VERSION}"} <= set(commands[0])
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(source.FILES)
    assert leftovers() == [source.VERSION, "lock"]


def test_a_damaged_or_half_written_copy_is_replaced(wheel, monkeypatch):
    index(monkeypatch, wheel)
    folder = source.fetch()
    (folder / source.FILES[0]).write_text("damaged")
    (folder.parent / "fetch-killed").mkdir()
    source._known.cache_clear()
    assert source.locate() is None
    assert source.source() == folder and source.locate() == folder
    assert leftovers() == [source.VERSION, "lock"]


def test_another_wheel_is_refused(wheel, tmp_path, monkeypatch):
    other = tmp_path / "other" / wheel.name
    other.parent.mkdir()
    with zipfile.ZipFile(other, "w") as archive:
        for name in source.FILES:
            archive.writestr(f"bfcl_eval/{name}", "something else")
    index(monkeypatch, other)
    with pytest.raises(MissingDependencyError, match="is not the wheel"):
        source.fetch()
    monkeypatch.setattr(source, "_WHEEL", hashlib.sha256(other.read_bytes()).hexdigest())
    with pytest.raises(MissingDependencyError, match="under that name is not"):
        source.fetch()
    assert source.locate() is None and leftovers() == ["lock"]


def test_without_an_index_the_message_has_the_command(wheel, monkeypatch):
    index(monkeypatch, status=1, said="WARNING: retrying\nERROR: No matching distribution found\n\n")
    with pytest.raises(MissingDependencyError, match="No matching distribution") as caught:
        source.source()
    assert str(caught.value).endswith(f"run: pip install --no-deps bfcl-eval=={source.VERSION}")


def test_uv_serves_where_there_is_no_pip(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(source.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="no pip, and there is no uv"):
        source.fetch()

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert command[:4] == ["/bin/uv", "pip", "install", "--no-deps"]
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(command[command.index("--target") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(source.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(source.subprocess, "run", run)
    assert source.content(source.fetch()) == source.content(HERE)


def test_a_cache_that_cannot_be_written_is_named(wheel, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGENTROPY_CACHE", str(tmp_path / "file"))
    with pytest.raises(MissingDependencyError, match="Not a directory"):
        source.fetch()


def _fetch_into(cache: str, wheel: str, digest: str, log: str) -> None:
    os.environ["AGENTROPY_CACHE"] = cache
    source._WHEEL = digest

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess:
        with open(log, "a") as file:
            file.write("run\n")
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    source.subprocess.run = run
    assert source.content(source.fetch()) == source._CONTENT


def test_workers_that_start_together_fetch_once(wheel, tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "cache"), str(wheel), source._WHEEL, str(tmp_path / "log"))
    workers = [context.Process(target=_fetch_into, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "run\n"


def test_playing_imports_nothing_of_the_package():
    program = (
        "import sys; from agentropy.envs.bfcl.env import BFCLEnv; env = BFCLEnv(); env.reset(seed=1)\n"
        "[env.step(action) for action in env.expert()]\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('bfcl_eval', 'torch', 'dotenv', 'requests')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
