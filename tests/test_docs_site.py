"""The documentation's site: it builds without a warning, leads nowhere that is not, and asks nobody else."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from agentropy import cli, config
from agentropy.registry import ENV_IDS
from tests.browser import chromium, needs_chromium

pytest.importorskip("material")

ROOT = Path(__file__).parents[1]


@dataclass
class Parsed(HTMLParser):
    """What a page names: its anchors, its links, and what a browser fetches for it."""

    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attrs}
        self.anchors |= {told[name] for name in ("id", "name") if name in told}
        if tag == "a" and "href" in told:
            self.links.append(told["href"])
        elif tag == "link" and told.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(told["href"])
        self.fetched += [told[name] for name in ("src", "data", "poster", "srcset") if name in told]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@cache
def parsed(path: Path) -> Parsed:
    page = Parsed()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Parsed]:
    return {str(path.relative_to(site)): parsed(path) for path in sorted(site.rglob("*.html"))}


def test_every_source_page_was_built(site, pages):
    sources = {str(path.relative_to(ROOT / "docs").with_suffix(".html")) for path in (ROOT / "docs").rglob("*.md")}
    assert sources | {"reference/cli.html", "reference/configuration.html"} == set(pages) - {"404.html"}
    assert not list(site.rglob("*.py"))


def test_every_recipe_and_every_environment_has_a_page(pages):
    recipes = {path.stem for path in (ROOT / "algorithms" / "recipes").glob("*.py")} - {"__init__", "common"}
    assert {f"algorithms/{name}.html" for name in recipes} <= set(pages)
    for name in ENV_IDS:
        page = pages[f"environments/{name.partition('/')[2].partition('-')[0].lower()}.html"]
        assert name in "".join(page.text)
        # The table of its arguments was filled in.
        assert "before truncation" in "".join(page.text) or "Remote" in name


def targets(site: Path) -> Iterator[tuple[Path, str, Path, str]]:
    """Page, link, the file that it leads to, and the anchor there."""
    for path in site.rglob("*.html"):
        for link in parsed(path).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            yield path, link, there / "index.html" if there.is_dir() else there, unquote(parts.fragment)


def test_every_link_and_anchor_leads_somewhere(site):
    found = list(targets(site))
    assert len(found) > 1000
    broken = [
        (str(path.relative_to(site)), link)
        for path, link, there, anchor in found
        if not there.is_file() or (anchor and there.suffix == ".html" and anchor not in parsed(there).anchors)
    ]
    assert not broken


def test_no_page_fetches_anything_from_elsewhere(site, pages):
    for name, page in pages.items():
        assert not [address for address in page.fetched if re.match(r"(https?:)?//", address)], name
    for sheet in site.rglob("*.css"):
        text = sheet.read_text()
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", text), sheet


def test_the_reference_has_every_command_and_every_option(pages):
    told = "".join(pages["reference/cli.html"].text)
    commands = [" ".join(names) for names, _ in _all_commands()]
    assert {"train", "eval", "serve envs", "recipes show"} <= set(commands)
    for command in commands:
        assert f"agentropy {command}" in told
    for flag in cli.FLAGS:
        assert f"--{flag}" in told
    told = "".join(pages["reference/configuration.html"].text)
    for section, field_ in config.RunConfig.model_fields.items():
        schema = field_.annotation
        for option in getattr(schema, "model_fields", {}):
            assert f"{section}.{option}" in told
    for section in ("model.hidden", "model.path"):
        assert section in told


def _all_commands() -> list[tuple[tuple[str, ...], object]]:
    import importlib.util

    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return list(hooks._commands(cli._parser(serving=True), ()))


def test_the_generated_pages_need_no_torch():
    code = """
import sys
sys.path.insert(0, "docs")
import hooks
hooks.command_line(), hooks.configuration(), hooks.challenges(), hooks.wrappers()
hooks.arguments("agentropy.envs.scienceworld.env:ScienceWorldEnv")
assert not {"torch", "mkdocs", "scienceworld", "textworld"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@needs_chromium
def test_read_from_the_disk_the_pages_ask_nobody_and_the_search_finds(site):
    pytest.importorskip("playwright.sync_api")
    asked: list[str] = []
    errors: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((site / "index.html").as_uri())
        page.locator("input.md-search__input").click()
        page.locator("input.md-search__input").press_sequentially("corridor hinge")
        page.locator("a.md-search-result__link[href*='algorithms/epo']").first.wait_for(timeout=60_000)
        page.goto((site / "concepts.html").as_uri())
        diagram = page.locator(".diagram svg")
        for scheme in ("default", "slate"):
            page.evaluate("scheme => document.body.setAttribute('data-md-color-scheme', scheme)", scheme)
            ink, paper = diagram.locator("text").first.evaluate(
                "node => [getComputedStyle(node).fill, getComputedStyle(document.body).backgroundColor]"
            )
            assert contrast(ink, paper) > 4.5, scheme
    assert not errors
    assert asked and not [address for address in asked if not address.startswith(("file:", "data:", "about:"))]


def contrast(first: str, second: str) -> float:
    """Ratio of luminances of two CSS colours, as the accessibility guidelines define it; alpha lies on the second."""

    def numbers(colour: str) -> list[float]:
        return [float(number) for number in re.findall(r"[\d.]+", colour)]

    def luminance(rgb: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ink, paper = numbers(first), numbers(second)[:3]
    alpha = ink[3] if len(ink) > 3 else 1.0
    mixed = [alpha * a + (1 - alpha) * b for a, b in zip(ink[:3], paper, strict=True)]
    light, dark = sorted((luminance(mixed), luminance(paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
