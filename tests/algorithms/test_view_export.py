"""An export is the same page with the same answers, and a folder that is none is left alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from agentropy.algorithms.view import export as export_module
from agentropy.algorithms.view.app import STATIC
from agentropy.algorithms.view.export import MANIFEST, export
from agentropy.algorithms.view.library import Library
from agentropy.errors import UsageError
from tests.algorithms.view_runs import make_run


def received(folder: Path) -> dict[str, Any]:
    """What the scripts of an export hand to the page, by key."""
    found = {}
    for path in (folder / "data").rglob("*.js"):
        match = re.fullmatch(r"agentropy\.receive\((\"[\w./-]+\"), (.*)\);\n", path.read_text(encoding="ascii"))
        assert match, path
        key = json.loads(match[1])
        assert path == folder / "data" / f"{key}.js"
        found[key] = json.loads(match[2])
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_export_holds_what_the_server_answers(tmp_path: Path) -> None:
    for name in ("epo/seed-0", "arpo/seed-0"):
        make_run(tmp_path / "grid" / name, steps=2, total_steps=2, forks=name.startswith("arpo"), credit=True)
    library = Library([tmp_path / "grid"])
    count, size = export(library, tmp_path / "page")
    told = received(tmp_path / "page")
    assert told == {key: json.loads(library.answer(key) or b"") for key in library.all_keys()}
    assert {"runs", "runs/epo-seed-0/trees/2/1", "runs/arpo-seed-0/metrics"} <= told.keys()
    assert told["runs/epo-seed-0/metrics"]["restart"]
    written = files(tmp_path / "page")
    for path in STATIC.iterdir():
        assert written[path.name] == path.read_bytes()
    assert json.loads(written["mode.js"].decode().removeprefix("var agentropy = ").rstrip(";\n"))["live"] is False
    assert count == len(written) - 1  # the manifest
    assert size == sum(map(len, written.values())) - len(written[MANIFEST])


def test_what_the_page_asks_for_is_beside_it(tmp_path: Path) -> None:
    make_run(tmp_path / "run", steps=1)
    export(Library([tmp_path]), tmp_path / "page")
    html = (tmp_path / "page" / "index.html").read_text()
    links = re.findall(r"<(?:script|link)[^>]*?(?:src|href)=\"([^\"]+)\"", html)
    assert links[0] == "mode.js" or "mode.js" in links
    for link in links:
        assert (tmp_path / "page" / link).is_file(), link
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|type=\"module\"", html), "files cannot load these"


def test_an_earlier_export_is_replaced_and_what_others_wrote_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3)
    library, page = Library([tmp_path / "run"]), tmp_path / "page"
    page.mkdir()
    export(library, page)
    (page / ".nojekyll").write_text("")
    (page / "data" / "mine.txt").write_text("mine")
    run.rewind(2)
    run.close()
    export(library, page)
    written = files(page)
    assert "data/runs/run/trees/1/0.js" in written and "data/runs/run/trees/3/0.js" not in written
    assert written[".nojekyll"] == b"" and written["data/mine.txt"] == b"mine"
    assert received(page)["runs/run/index"]["steps"] == [1]
    export(library, tmp_path / "other")
    del written[".nojekyll"], written["data/mine.txt"]
    assert files(tmp_path / "other") == written, "equal runs give equal exports"


def test_an_export_that_was_interrupted_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", steps=2)
    library, page = Library([tmp_path / "run"]), tmp_path / "page"
    answer = library.answer

    def stops(key: str, cursor: str | None = None) -> bytes | None:
        if "trees/2" in key:
            raise KeyboardInterrupt
        return answer(key, cursor)

    monkeypatch.setattr(library, "answer", stops)
    with pytest.raises(KeyboardInterrupt):
        export(library, page)
    monkeypatch.undo()
    export(library, page)
    assert received(page).keys() == set(library.all_keys())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.txt", "mine"),
        (MANIFEST, "{}"),
        (MANIFEST, '{"files": ["../precious.txt"]}'),
        (MANIFEST, '{"files": ["/etc/hosts"]}'),
        (MANIFEST, '{"files": 3}'),
    ],
)
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, name: str, text: str) -> None:
    make_run(tmp_path / "run", steps=1)
    page = tmp_path / "page"
    page.mkdir()
    (tmp_path / "precious.txt").write_text("precious")
    (page / name).write_text(text)
    with pytest.raises(UsageError, match="holds something else than an export"):
        export(Library([tmp_path / "run"]), page)
    assert files(page) == {name: text.encode()} and (tmp_path / "precious.txt").exists()


def test_a_run_folder_is_no_place_for_an_export(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1)
    before = files(run.path)
    with pytest.raises(UsageError, match="holds something else"):
        export(Library([run.path]), run.path)
    assert files(run.path) == before


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "run", steps=1)
    (tmp_path / "file").write_text("")
    for place in ("file", "file/page"):
        with pytest.raises(UsageError, match=re.escape(str(tmp_path / "file"))):
            export(Library([tmp_path / "run"]), tmp_path / place)


def test_a_tree_that_is_gone_meanwhile_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run", steps=1)
    library = Library([tmp_path / "run"])
    keys = [*library.all_keys(), "runs/run/trees/9/0"]
    monkeypatch.setattr(export_module.Library, "all_keys", lambda self: iter(keys))
    export(library, tmp_path / "page")
    assert received(tmp_path / "page")["runs/run/trees/9/0"] is None
