"""`agentropy view`: an address for the browser, files, or a tree in the terminal; and what it says when it cannot."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from agentropy.algorithms.view import command
from agentropy.algorithms.view.command import view
from agentropy.errors import MissingDependencyError, UsageError
from tests.algorithms.view_runs import make_run


def started(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    """The command under way, and the address that it printed."""
    words = [sys.executable, "-m", "agentropy", "view", *arguments, "--no-browser"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "http://" in line, process.communicate()
    return process, line[line.index("http://") :].split()[0]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return process.returncode, out + err


def test_a_run_is_served_until_it_is_interrupted(tmp_path: Path) -> None:
    make_run(tmp_path / "mine", steps=1)
    process, url = started(str(tmp_path / "mine"), "--port", "0")
    try:
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{url}api/runs") as answer:
            assert json.load(answer)["runs"][0]["name"] == "mine"
        with urllib.request.urlopen(url) as answer:
            assert b"<html" in answer.read()
    finally:
        status, said = ended(process)
    assert status == 0 and "Traceback" not in said and "resume" not in said


def test_the_next_free_port_is_taken_unless_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(command, "PORT", port)
        monkeypatch.setattr(command, "_PORTS", 1)
        with command._listen("127.0.0.1", None) as found:
            assert found.getsockname()[1] not in (0, port)
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1 port {port}: "):
            view([str(make_run(tmp_path, steps=0).path)], port=port, browser=False)
    asked, resolve = [], socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: (asked.append(given), resolve(*given, **more))[1])
    with pytest.raises(UsageError, match=r"cannot listen on no\.such\.host\.invalid"):
        command._listen("no.such.host.invalid", None)
    assert len(asked) == 1  # a name server may take seconds to say no
    with pytest.raises(UsageError, match="--port is 65536; expected 0 to 65535"):
        view([str(tmp_path)], port=65536)


def test_an_export_is_written_and_its_page_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", steps=1)
    assert view([str(run.path)], export=str(tmp_path / "page")) == 0
    said = capsys.readouterr().out
    assert said.rstrip().endswith(str(tmp_path / "page" / "index.html")) and " files, " in said
    assert (tmp_path / "page" / "index.html").is_file()


def test_without_the_packages_that_serve_it_says_which_and_still_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, steps=1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    for options in ({}, {"export": str(tmp_path / "page")}):
        with pytest.raises(MissingDependencyError, match=r'needs uvicorn, .*pip install "agentropy\[train\]"'):
            view([str(run.path)], browser=False, **options)
    assert view([str(run.path)], text=True, task="0", depth=1) == 0
    assert "task-1-0  train, step 1, tree 0 of 2" in capsys.readouterr().out


def test_no_browser_is_opened_where_there_is_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    assert not command._has_browser()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert command._has_browser()
