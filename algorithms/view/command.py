"""``agentropy view``.

- ``view``: serve the page, write it as files, or draw a tree in the terminal.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from ...extras import require
from ...listening import LARGEST_PORT, listen

if TYPE_CHECKING:
    from .library import Library

PORT = 8765
_PORTS = 20
"""Ports that are tried from ``PORT`` on, before any free one."""
_ANYWHERE = ("0.0.0.0", "::")
_SHUTDOWN_SECONDS = 2


def view(
    folders: Sequence[str],
    *,
    export: str | None = None,
    text: bool = False,
    step: int | None = None,
    task: str | None = None,
    depth: int | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    browser: bool = True,
) -> int:
    """Show runs; returns the exit status.

    Args:
        folders: run folders, and folders with runs in them.
        export: folder that receives the page as files; nothing is served then.
        text: draw one tree in the terminal; nothing is served then.
        step: see ``text.show``, as are ``task`` and ``depth``.
        host: the address to listen on.
        port: 0 takes any free one, None a free one from ``PORT`` on.
        browser: whether to open one.

    Raises:
        UsageError: a folder holds no run, options contradict each other, or the port is taken.
        MissingDependencyError: FastAPI or uvicorn is not installed.
    """
    if text:
        if export is not None:
            raise UsageError("--text and --export are two ways to look at a run; choose one of them")
        if len(folders) > 1:
            raise UsageError(f"--text draws a tree of one run, and {len(folders)} folders were named")
        from ..runs import RunFolder
        from .text import show

        show(RunFolder.open(folders[0]), step, task, depth)
        return 0
    for name, value in (("step", step), ("task", task), ("depth", depth)):
        if value is not None:
            raise UsageError(f"--{name} goes with --text; the page has its own choice of trees")
    if port is not None and not 0 <= port <= LARGEST_PORT:
        raise UsageError(f"--port is {port}; expected 0 to {LARGEST_PORT}")
    from .library import Library

    library = Library(folders)
    require("`agentropy view` without --text", "train", ("fastapi", "uvicorn"))
    if export is not None:
        from .export import export as write

        print(f"writing every tree into {export} …", flush=True)
        count, size = write(library, export)
        print(f"{count} files, {size / 1e6:.1f} MB; open {Path(export) / 'index.html'}")
        return 0
    return _serve(library, host, port, browser)


def _serve(library: Library, host: str, port: int | None, browser: bool) -> int:
    import uvicorn

    from .app import LOOPBACK_NAMES, create_app

    names = {*LOOPBACK_NAMES, host.lower(), *({socket.gethostname().lower()} if host in _ANYWHERE else ())}
    app = create_app(library, names=names, addresses=host in _ANYWHERE)
    listener = _listen(host, port)
    shown = "127.0.0.1" if host in _ANYWHERE else f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}/"
    runs = library.runs()
    what = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{what} on {url} (Ctrl-C ends it)", flush=True)
    if browser and _has_browser():
        # It listens already: the browser waits until the first answer.
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="off",
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        print()
    finally:
        listener.close()
    return 0


def _has_browser() -> bool:
    """Whether there is a screen to open one on; a browser in the terminal would take it away from this command."""
    return sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))


def _listen(host: str, port: int | None) -> socket.socket:
    """A listening socket at ``port``; at the first free one from ``PORT`` on where it is None.

    Raises:
        UsageError: the address cannot be had.
    """
    if port is not None:
        return listen(host, port)
    for number in range(PORT, PORT + _PORTS):
        try:
            return listen(host, number)
        except UsageError as error:
            if isinstance(error.__cause__, socket.gaierror):  # no port helps a host that is not there
                raise
    return listen(host, 0)
