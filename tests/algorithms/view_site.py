"""A server of runs and a browser to look at them with, as fixtures.

- ``site``: a served folder of runs. ``open_page``: opens addresses of it. ``served``: serves another folder.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from agentropy.algorithms.view.app import create_app
from agentropy.algorithms.view.library import Library
from tests.algorithms.view_page import small_run
from tests.algorithms.view_runs import make_run
from tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
MANY = 10_000
MILLISECONDS = 20_000.0
"""To wait for what must appear; a busy machine needs many of them, and a good page none."""
TREE = "#/run/forks/tree/3/0"


@dataclass
class Site:
    """A served folder of runs."""

    address: str
    folder: Path
    problems: list[str] = field(default_factory=list)
    """What the browser complained of, and requests that left for another host."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("runs")
    small_run(folder / "forks")
    # Played the same tasks, and is not finished: what is appended to it is live.
    make_run(folder / "live", steps=2, tasks=2, total_steps=9, seed=1)
    make_run(folder / "many", steps=5, tasks=MANY // 40, group=8, turns=1)
    with served(folder) as address:
        yield Site(address, folder)


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of the runs in ``folder``."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(create_app(Library([folder])), port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def contexts(browser: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """A context for each theme and size, so that the browser keeps the page's files; a fresh one remembers nothing."""
    kept: dict[str, BrowserContext] = {}

    def context(theme: str, size: Any, *, fresh: bool = False) -> BrowserContext:
        key = f"{theme} {size} {len(kept) if fresh else ''}"
        if key not in kept:
            kept[key] = browser.new_context(viewport=size, color_scheme=theme, reduced_motion="reduce")
            kept[key].set_default_timeout(MILLISECONDS)
        return kept[key]

    yield context
    for one in kept.values():
        one.close()


@pytest.fixture
def open_page(site: Site, contexts: Callable[..., BrowserContext]) -> Iterator[Open]:
    """Opens addresses of the page; at the end no error was logged, and no request had left for another host."""
    pages = []

    def go(
        hash: str = "#/", *, size: Any = WIDE, theme: str = "light", fresh: bool = False, address: str = site.address
    ) -> Page:
        page = contexts(theme, size, fresh=fresh).new_page()
        pages.append(page)
        inside = address.removesuffix("index.html")
        page.on("console", lambda m: site.problems.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: site.problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(inside) else site.problems.append(f"asks {r.url}"))
        page.goto(address + hash)
        ready(page)
        return page

    site.problems.clear()
    yield go
    for page in pages:
        page.close()
    assert not site.problems


def ready(page: Page) -> None:
    page.wait_for_selector("main:not([aria-busy]) h1", state="attached")
