"""Claims about the command: how it starts, and that nothing outlives it however it ends."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("msgpack")

from agentropy.benchmarks import serve_load
from agentropy.envs.remote import RemoteEnv
from agentropy.envs.serve.command import add_arguments, settings_of
from agentropy.envs.serve.settings import Settings, registered_ids
from agentropy.errors import UsageError

HERE = Path(__file__).parent
OBEDIENT = "pool_worlds:Obedient-v0"


def start(*options: str) -> tuple[subprocess.Popen[str], str]:
    """Start the command; return it and its URL."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "agentropy.envs.serve", "--env", OBEDIENT, "--port", "0", "--workers", "2", *options],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = ""
    for line in process.stdout:
        if line.startswith("on "):
            url = line.split()[1]
            break
    return process, url


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    process, url = start()
    yield process, url
    process.kill()
    process.communicate()


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while (alive := {pid for pid, _ in serve_load._parents()}.intersection(pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(server: tuple[subprocess.Popen[str], str], number: signal.Signals) -> None:
    process, url = server
    env = RemoteEnv(url, OBEDIENT)
    env.reset(options={"task": "a"})
    workers = [pid for pid, parent in serve_load._parents() if parent == process.pid]
    assert len(workers) == 2
    process.send_signal(number)
    assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 0
    assert gone(workers, 0.0)
    env.close()


def test_its_death_ends_its_processes(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    env = RemoteEnv(url, OBEDIENT)
    env.reset(options={"task": "a"})
    env.step("child")  # a process that the world itself has started
    workers = [pid for pid, parent in serve_load._parents() if parent == process.pid]
    children = [pid for pid, parent in serve_load._parents() if parent in workers]
    assert len(workers) == 2 and len(children) == 1
    process.kill()
    assert gone(workers + children)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--host", "0.0.0.0"], "a token is needed"),
        (["--host", "198.51.100.7", "--token-file", "tokens"], "cannot listen on 198.51.100.7"),
        (["--token-file", "absent"], "cannot read the token file absent"),
        (["--workers", "0"], "workers must be at least 1"),
        (["--idle-seconds", "-1"], "idle_seconds must be positive"),
        (["--env", "agentropy/Remote-v0"], "is itself a client"),
    ],
)
def test_wrong_options_are_named(options: list[str], what: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("0123456789abcdef0123\n")
    command = [sys.executable, "-m", "agentropy.envs.serve", "--port", "0", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("agentropy: ")
    assert what in done.stderr and "Traceback" not in done.stderr


def parse(*options: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_of(parser.parse_args(options))


def test_options_become_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AGENTROPY_TOKEN", raising=False)
    assert parse() == Settings()
    assert "agentropy/Remote-v0" not in registered_ids() and "agentropy/ALFWorld-v0" in registered_ids()
    file = tmp_path / "tokens"
    file.write_text("first-token-of-enough\n\n second-token-of-enough \n")
    options = ["--host", "0.0.0.0", "--port", "1", "--env", "a", "--env", "b", "--allow", "data", "--max-pools", "2"]
    settings = parse(*options, "--token-file", str(file), "--max-sessions-per-client", "3")
    assert settings.tokens == ("first-token-of-enough", "second-token-of-enough")
    assert (settings.host, settings.port, settings.env_ids) == ("0.0.0.0", 1, ("a", "b"))
    assert (settings.allowed, settings.max_pools, settings.max_sessions_per_client) == (frozenset({"data"}), 2, 3)
    monkeypatch.setenv("AGENTROPY_TOKEN", "third-token-of-enough")
    assert parse().tokens == ("third-token-of-enough",)
    file.write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        parse("--token-file", str(file))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("agentropy.envs.serve.command", ("fastapi", "uvicorn", "httpx", "torch", "transformers", "msgpack")),
        ("agentropy.envs.remote", ("fastapi", "uvicorn", "starlette", "httpx", "torch", "transformers")),
        ("agentropy.envs.serve.connection", ("fastapi", "uvicorn", "starlette", "torch", "transformers")),
        ("agentropy.envs.serve.app", ("torch", "transformers")),
    ],
)
def test_what_is_imported(module: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, json, {module}; print(json.dumps([name for name in {absent!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_load_with_kills_loses_doubles_and_leaks_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("alfworld")
    monkeypatch.setattr(serve_load, "IDLE_SECONDS", 3.0)
    monkeypatch.setattr(serve_load, "VANISHING", 2)
    out = tmp_path / "serve_load.json"
    arguments = ["--sessions", "32", "--kills", "2", "--episodes", "2", "--steps", "8", "--workers", "2", "--formats"]
    assert serve_load.main([*arguments, "--out", str(out)]) == 0, capsys.readouterr().out
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["kills"]["episodes"] == 64 and report["kills"]["recoveries"] >= 1
    assert report["vanished_clients"] == {"sessions_open": 2, "sessions_left": 0}
