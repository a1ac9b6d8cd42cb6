"""What the page is told is what the run folder holds, now and as it grows, and nobody else is told."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from agentropy.agents.tree import Tree
from agentropy.algorithms.instruments.credit import credit_path, load_credit
from agentropy.algorithms.runs import RunFolder
from agentropy.algorithms.view import library as library_module
from agentropy.algorithms.view import saved_run as saved_run_module
from agentropy.algorithms.view.app import create_app
from agentropy.algorithms.view.index import index_file, step_files
from agentropy.algorithms.view.library import Library
from agentropy.algorithms.view.saved_run import SavedRun
from agentropy.algorithms.view.text import load_trees
from agentropy.config import load_config
from agentropy.errors import UsageError
from tests.algorithms.view_runs import TOKENIZER, append, make_run, random_tree, success


class Page:
    """Asks as the page does."""

    def __init__(self, *folders: Path, **options: Any) -> None:
        app = create_app(Library(folders), **options)
        self.client = TestClient(app, base_url="http://127.0.0.1:8765")

    def ask(self, key: str, **parameters: str) -> Any:
        answer = self.client.get(f"/api/{key}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def run(self, name: str) -> dict[str, Any]:
        (found,) = (run for run in self.ask("runs")["runs"] if run["name"] == name)
        return found


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are looked through at every question."""
    monkeypatch.setattr(library_module, "_SCAN_SECONDS", -1.0)


def columns(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an index."""
    assert {len(column) for column in answer["columns"].values()} <= {answer["count"]}
    names = list(answer["columns"])
    return [dict(zip(names, values, strict=True)) for values in zip(*answer["columns"].values(), strict=True)]


def test_a_run_is_told_in_one_line(tmp_path: Path) -> None:
    make_run(tmp_path / "epo", steps=3, total_steps=5, credit=True, overrides=("seed=7", "algorithm.preset=paper"))
    (run,) = Page(tmp_path / "epo").ask("runs")["runs"]
    cursor, index, updated = run.pop("metrics"), run.pop("index"), run.pop("updated")
    assert run == {
        "id": "epo",
        "name": "epo",
        "algorithm": "epo",
        "preset": "paper",
        "env": "agentropy/ALFWorld-v0",
        "model": "small",
        "seed": 7,
        "step": 3,
        "steps": 5,
        "live": True,
        "success": {"step": 3, "split": "valid_unseen", "rate": 0.5, "low": 0.4, "high": 0.6, "tasks": 20},
        "before": {"step": 0, "split": "valid_unseen", "rate": 0.25, "low": 0.15, "high": 0.35, "tasks": 20},
        "alarms": [],
        "trees": 6,
        "trajectories": 24,
        "credit": True,
    }
    assert cursor and len(index) == 12 and abs(updated - time.time()) < 60


def test_a_run_is_under_way_until_its_last_evaluation_or_its_silence(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2, total_steps=3)
    page = Page(tmp_path)
    assert page.ask("runs")["runs"][0]["live"]
    append(run, "train", 3, success(0.5))
    assert page.ask("runs")["runs"][0]["live"], "the last evaluation is to come"
    append(run, "eval", 3, success(0.5))
    assert not page.ask("runs")["runs"][0]["live"]
    silent = make_run(tmp_path / "silent", steps=2, total_steps=3)
    append(silent, "train", 2, {"time/rollout_seconds": 100.0, "time/update_seconds": 100.0})
    for ago, live in ((500, True), (1500, False)):
        then = time.time() - ago
        for path in [silent.path, *silent.path.iterdir()]:
            os.utime(path, (then, then))
        assert Page(silent.path).ask("runs")["runs"][0]["live"] is live


def test_alarms_are_those_of_the_instruments(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=1)
    for step in range(2, 14):
        append(run, "train", step, success(0.5) | {"entropy/action_mean": 0.8 if step < 9 else 0.01})
    (alarm,) = Page(tmp_path).ask("runs")["runs"][0]["alarms"]
    assert alarm["kind"] == "entropy collapse" and alarm["step"] == 11 and "0.010" in alarm["text"]


def test_only_rows_that_a_reader_lacks_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2)
    page = Page(tmp_path)
    key = f"runs/{page.ask('runs')['runs'][0]['id']}/metrics"
    first = page.ask(key)
    assert first["restart"] and first["rows"] == list(run.rows())
    assert page.ask(key, cursor=first["cursor"]) == {"cursor": first["cursor"], "restart": False, "rows": []}
    append(run, "train", 3, {"loss": float("nan")})
    with open(run.metrics_file, "a") as file:
        file.write('{"phase": "train", "step": 4, "lo')
    second = page.ask(key, cursor=first["cursor"])
    assert second["rows"] == [{"phase": "train", "step": 3, "loss": None}] and not second["restart"]
    assert page.ask("runs")["runs"][0]["metrics"] == second["cursor"]
    with open(run.metrics_file, "a") as file:
        file.write('ss": 0.5}\n')
    third = page.ask(key, cursor=second["cursor"])
    assert third["rows"] == [{"phase": "train", "step": 4, "loss": 0.5}]
    assert page.ask(key, cursor="7-0badcafe")["restart"]


def test_a_reader_of_rows_that_a_resumed_run_cut_away_begins_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=4)
    page = Page(tmp_path)
    id = page.ask("runs")["runs"][0]["id"]
    rows, index = page.ask(f"runs/{id}/metrics"), page.ask(f"runs/{id}/index")
    tree = page.ask(f"runs/{id}/trees/4/0")
    assert index["steps"] == [1, 2, 3, 4]
    run.rewind(3)  # an evaluation and two steps
    run.close()
    after = page.ask(f"runs/{id}/metrics", cursor=rows["cursor"])
    assert after["restart"] and [row["step"] for row in after["rows"]] == [0, 1, 2]
    assert page.ask(f"runs/{id}/index")["steps"] == [1, 2]
    assert page.client.get(f"/api/runs/{id}/trees/4/0").status_code == 404
    run.save_trees(4, [random_tree(np.random.default_rng(9), "another", 2, 3)])
    again = page.ask(f"runs/{id}/index")
    assert again["steps"] == [1, 2, 4] and again["index"] != index["index"] and "another" in again["tasks"]
    assert page.ask(f"runs/{id}/trees/4/0")["task"] == "another" != tree["task"]


@pytest.mark.parametrize("indexed", [True, False], ids=["index written", "index missing"])
def test_the_columns_address_every_trajectory(tmp_path: Path, indexed: bool) -> None:
    run = make_run(tmp_path, steps=3, tasks=2, group=4, forks=True, overrides=("algorithm.name=arpo",))
    if not indexed:
        for path in step_files(tmp_path).values():
            index_file(path).unlink()
    page = Page(tmp_path)
    overview = page.ask("runs")["runs"][0]
    assert (overview["trajectories"], overview["index"] is None) == ((24, False) if indexed else (None, True))
    answer = page.ask(f"runs/{overview['id']}/index")
    rows = columns(answer)
    places = [(row["step"], row["tree"], row["trajectory"]) for row in rows]
    assert places == [(step, tree, member) for step in (1, 2, 3) for tree in (0, 1) for member in range(4)]
    trees = {step: load_trees(run, step)[1] for step in answer["steps"]}
    for row in rows:
        tree = trees[row["step"]][row["tree"]]
        trajectory = tree.trajectories[row["trajectory"]]
        assert (answer["tasks"][row["task"]], answer["splits"][row["split"]]) == (tree.task, "train")
        assert (row["reward"], row["won"], row["turns"]) == (trajectory.reward, trajectory.won, trajectory.turns)
        assert row["tokens"] == tree.mask(trajectory.leaves[0]).sum()
        assert row["left"] == trajectory.info.get("fork", {"parent": -1})["parent"]
        told = page.ask(f"runs/{overview['id']}/trees/{row['step']}/{row['tree']}")["trajectories"][row["trajectory"]]
        assert {name: told[name] for name in ("forks", "left", "left_at", "tokens", "entropy")} == {
            name: row[name] for name in ("forks", "left", "left_at", "tokens", "entropy")
        }
    assert any(row["forks"] for row in rows)
    assert page.ask("runs")["runs"][0]["trajectories"] == 24, "counted by now"
    assert answer["index"] == page.ask("runs")["runs"][0]["index"]


def test_a_tree_is_told_token_by_token(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=1, forks=True, credit=True)
    page = Page(tmp_path)
    id = page.ask("runs")["runs"][0]["id"]
    answer = page.ask(f"runs/{id}/trees/1/1")
    tree = load_trees(run, 1)[1][1]
    assert answer["pieces"] and (answer["task"], answer["split"], answer["info"]) == (tree.task, "train", tree.info)
    for told, node in zip(answer["nodes"], tree.nodes, strict=True):
        for name in ("parent", "role", "turn", "text", "reward", "version", "sampled"):
            assert told[name] == getattr(node, name)
        pairs = [answer["vocabulary"][place] for place in told["tokens"]]
        assert [token for token, _ in pairs] == node.tokens.tolist()
        assert "".join(text for _, text in pairs) == TOKENIZER.decode(node.tokens) == node.text
        if node.sampled:
            np.testing.assert_allclose(told["logprobs"], node.logprobs, rtol=6e-4)
            np.testing.assert_allclose(told["entropies"], node.entropies, rtol=6e-4)
        else:
            assert told["logprobs"] is told["entropies"] is None
    assert answer["trajectories"][0]["seed"] == "2919813369553411398"
    assert [told["leaves"] for told in answer["trajectories"]] == [list(t.leaves) for t in tree.trajectories]
    credit = load_credit(credit_path(tmp_path, 1))
    assert len(answer["credit"]) == len(tree.trajectories)
    for told in answer["credit"]:
        advantage, weight = credit.row(1, told["leaf"]) or pytest.fail("no such row")
        np.testing.assert_allclose(told["advantage"], advantage, rtol=6e-4)
        np.testing.assert_allclose(told["weight"], weight, rtol=6e-4)
        assert len(told["advantage"]) == tree.mask(told["leaf"]).sum()


def test_what_is_missing_is_null_and_what_does_not_fit_is_not_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=2, tasks=1, credit=True)
    page = Page(tmp_path)
    id = page.ask("runs")["runs"][0]["id"]
    assert page.ask(f"runs/{id}/trees/1/0")["credit"]
    shutil.copy(credit_path(tmp_path, 2), credit_path(tmp_path, 1))
    assert page.ask(f"runs/{id}/trees/1/0")["credit"] is None, "credit of other trees"
    credit_path(tmp_path, 1).write_bytes(b"PK")
    assert page.ask(f"runs/{id}/trees/1/0")["credit"] is None
    credit_path(tmp_path, 1).unlink()
    assert page.ask(f"runs/{id}/trees/1/0")["credit"] is None
    shutil.rmtree(run.checkpoints / "step-000000")
    answer = Page(tmp_path).ask(f"runs/{id}/trees/1/0")
    assert not answer["pieces"] and {text for _, text in answer["vocabulary"]} == {None}


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=0)
    tree = Tree("room", "train")
    start = tree.add(-1, "prompt", [6])
    tree.add(start, "action", [7, 8], sampled=True, logprobs=[np.nan, -1], entropies=[np.inf, 0.5])
    tree.info = {"score": float("nan")}
    run.save_trees(1, [tree])
    page = Page(tmp_path)
    answer = page.ask(f"runs/{page.ask('runs')['runs'][0]['id']}/trees/1/0")
    assert answer["nodes"][1]["logprobs"] == [None, -1.0] and answer["nodes"][1]["entropies"] == [None, 0.5]
    assert answer["info"] == {"score": None}


def test_trees_of_older_versions_are_told_and_those_of_newer_ones_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=1, tasks=1)
    entry = load_trees(run, 1)[1][0].to_dict()
    del entry["info"]
    for trajectory in entry["trajectories"]:
        del trajectory["info"], trajectory["seed"], trajectory["failed"]
    lines = json.dumps(entry) + "\n" + json.dumps(entry | {"format": 99}) + "\n"
    step_files(tmp_path)[1].write_bytes(gzip.compress(lines.encode()))
    page = Page(tmp_path)
    id = page.ask("runs")["runs"][0]["id"]
    assert page.ask(f"runs/{id}/index")["columns"]["failed"] == [0] * 8
    told = page.ask(f"runs/{id}/trees/1/0")
    assert told["info"] == {} and told["trajectories"][0]["seed"] == "0"
    newer = page.client.get(f"/api/runs/{id}/trees/1/1")
    assert newer.status_code == 404 and "format 99" in newer.json()["error"]


def test_a_damaged_step_is_named_and_the_others_are_told(tmp_path: Path) -> None:
    make_run(tmp_path, steps=3)
    path = step_files(tmp_path)[2]
    path.write_bytes(path.read_bytes()[:-5])
    page = Page(tmp_path)
    id = page.ask("runs")["runs"][0]["id"]
    answer = page.ask(f"runs/{id}/index")
    assert answer["steps"] == [1, 3] and answer["unreadable"] == [2] and answer["count"] == 16
    assert page.client.get(f"/api/runs/{id}/trees/2/0").status_code == 404


def test_evaluations_law_and_configuration_are_told(tmp_path: Path) -> None:
    options = "{api_key='sk-1', apikey='sk-2', url='http://me:pw@host/v1'}"
    run = make_run(tmp_path, steps=4, overrides=(f"engine.options={options}",))
    for step, split in ((10, "valid_unseen"), (2, "valid_seen"), (10, "valid_seen")):
        run.save_outcomes(
            step, split, {"panel": "x", "tasks": ["a"], "won": [[True]], "turns": [[3]], "score": [[1.0]]}
        )
    (tmp_path / "evaluations" / "step-000011-cut.json").write_text('{"step": 11')
    page = Page(tmp_path)
    id = page.ask("runs")["runs"][0]["id"]
    told = page.ask(f"runs/{id}/evaluations")["evaluations"]
    assert [(e["step"], e["split"]) for e in told] == [(2, "valid_seen"), (10, "valid_seen"), (10, "valid_unseen")]
    append(run, "train", 5, success(0.9) | {"entropy/action_mean": float("nan")})
    append(run, "train", 6, success(0.9) | {"entropy/action_mean": None})
    law = page.ask(f"runs/{id}/law")
    assert law["points"] == [[pytest.approx(0.9 - 0.1 * step), step / 5] for step in (1, 2, 3, 4)]
    assert law["ceiling"] == pytest.approx(law["b"] - law["a"])
    config = page.ask(f"runs/{id}/config")
    shown = {"api_key": "(hidden)", "apikey": "(hidden)", "url": "http://(hidden)@host/v1"}
    assert config["values"]["engine"]["options"] == shown
    assert "sk-" not in config["toml"] and "pw" not in config["toml"] and "[train]" in config["toml"]
    assert config["values"]["agent"]["max_action_tokens"] == 16
    short = make_run(tmp_path / "short", steps=1)
    page = Page(short.path)
    assert page.ask("runs/short/law") is None and page.ask("runs/short/evaluations") == {"evaluations": []}
    assert page.ask("runs/short/config")["toml"] == (short.path / "config.toml").read_text()


@pytest.mark.usefixtures("at_once")
def test_runs_are_found_in_folders_now_and_later(tmp_path: Path) -> None:
    grid = tmp_path / "grid"
    for name in ("epo/seed-0", "epo/seed-1", "epo-seed-0", ".hidden"):
        make_run(grid / name, steps=1)
    (grid / "config.toml").write_text("[methods]\n")  # of the comparison, not of a run
    (grid / "loop").symlink_to(grid)
    lone = make_run(tmp_path / "lone", steps=1)
    page = Page(grid)
    assert [run["name"] for run in page.ask("runs")["runs"]] == ["epo/seed-0", "epo/seed-1", "epo-seed-0"]
    ids = {run["name"]: run["id"] for run in page.ask("runs")["runs"]}
    assert len(set(ids.values())) == 3
    make_run(grid / "arpo", steps=1)
    shutil.rmtree(grid / "epo" / "seed-1")
    later = {run["name"]: run["id"] for run in page.ask("runs")["runs"]}
    assert later.keys() == {"arpo", "epo/seed-0", "epo-seed-0"}
    assert all(later[name] == ids[name] for name in ("epo/seed-0", "epo-seed-0"))
    assert page.client.get(f"/api/runs/{ids['epo/seed-1']}/index").status_code == 404
    both = Page(lone.path, grid, lone.path).ask("runs")["runs"]
    assert [run["name"] for run in both] == ["lone", "grid/arpo", "grid/epo/seed-0", "grid/epo-seed-0"]


def test_a_run_with_a_broken_configuration_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    make_run(tmp_path / "run", steps=2)
    (tmp_path / "run" / "config.toml").write_text("seed = [")
    (run,) = Page(tmp_path).ask("runs")["runs"]
    assert (run["name"], run["algorithm"], run["steps"], run["step"]) == ("run", None, None, 2)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    """As the runs of a comparison, which are all called after their seed."""
    for name in ("grpo/seed-0", "arpo/seed-0", "arpo/seed-1"):
        make_run(tmp_path / name, steps=0)
    for folders, names in (
        (["grpo/seed-0", "arpo/seed-0"], ["grpo/seed-0", "arpo/seed-0"]),
        (["grpo/seed-0", "arpo/seed-0", "grpo/seed-0"], ["grpo/seed-0", "arpo/seed-0"]),
        (["arpo/seed-1", "grpo/seed-0"], ["seed-1", "seed-0"]),
        (["arpo", "grpo/seed-0"], ["arpo/seed-0", "arpo/seed-1", "seed-0"]),
        ([""], ["arpo/seed-0", "arpo/seed-1", "grpo/seed-0"]),
    ):
        assert [run.name for run in Library([tmp_path / folder for folder in folders]).runs()] == names


@pytest.mark.parametrize("inside", [(), ("config.toml",), ("deep/er/and/even/deeper/run",)])
def test_a_folder_without_a_run_is_named(tmp_path: Path, inside: tuple[str, ...]) -> None:
    for name in inside:
        if name.endswith(".toml"):
            (tmp_path / name).write_text("")
        else:
            make_run(tmp_path / name, steps=0)
    with pytest.raises(UsageError, match="holds no run"):
        Library([tmp_path])


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "localhost.evil.example:80",
        "192.168.0.7",
        "",
        "[::2]",
    ],
)
def test_who_calls_it_by_another_name_is_refused(tmp_path: Path, host: str) -> None:
    make_run(tmp_path, steps=1)
    page = Page(tmp_path)
    for path in ("/api/runs", "/", "/mode.js"):
        answer = page.client.get(path, headers={"host": host})
        assert answer.status_code == 421 and "agentropy view" in answer.json()["error"]


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "LOCALHOST:1", "127.0.0.1", "[::1]:8765", "[::1]"])
def test_its_own_names_will_do_at_any_port(tmp_path: Path, host: str) -> None:
    make_run(tmp_path, steps=1)
    assert Page(tmp_path).client.get("/api/runs", headers={"host": host}).status_code == 200


def test_where_it_listens_on_all_addresses_it_answers_to_numbers_and_its_name(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1)
    page = Page(tmp_path, names={"box"}, addresses=True)
    for host, status in (("192.168.0.7:8765", 200), ("[fe80::1]:8765", 200), ("box:1", 200), ("evil.example", 421)):
        assert page.client.get("/api/runs", headers={"host": host}).status_code == status


def test_it_only_reads_and_lets_no_other_site_read(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1)
    client = Page(tmp_path).client
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        answer = client.request(method, "/api/runs", headers={"origin": "http://evil.example"})
        assert answer.status_code == 405
        assert not any(name.startswith("access-control") for name in answer.headers)
    answer = client.get("/api/runs", headers={"origin": "http://evil.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "script-src 'self';" in answer.headers["content-security-policy"]


def test_no_path_leads_out_of_the_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "run", steps=1)
    (tmp_path / "secret.js").write_text("secret")
    (tmp_path / "trajectories").mkdir()
    client = Page(tmp_path / "run").client
    inside = [
        "runs/../run/index",
        "runs/run/../index",
        "runs/run/config/../../secret.js",
        "runs/run/trees/1/../1",
        "runs/run/trees/-1/0",
        "runs/run/trees/1/-1",
        "runs/run/trees/1/99",
        "runs/run/trees/9/0",
        "runs/run/trees/1/0/0",
        "runs/run/trees/٣/0",
        f"runs/run/trees/{'9' * 5000}/0",
        "runs/run",
        "runs/run/",
        "runs/other/index",
        "secret.js",
        "",
    ]
    for key in inside:
        answer = client.get("/api/" + key.replace("/", "%2F"))
        assert answer.status_code == 404 and "secret" not in answer.text.replace("secret.js", "")
    for path in ("/..%2fapp.py", "/%2e%2e/app.py", "/../app.py", "/..%5capp.py", "//etc/passwd", "/%00"):
        assert client.get(path).status_code in (404, 405), path


def test_a_fault_is_a_sentence_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path, steps=1)
    library = Library([tmp_path])
    monkeypatch.setattr(library, "answer", lambda key, cursor: [][0])
    client = TestClient(create_app(library), base_url="http://localhost", raise_server_exceptions=False)
    answer = client.get("/api/runs")
    assert answer.status_code == 500 and answer.json() == {"error": "IndexError: list index out of range"}


def test_answers_are_kept_as_far_as_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, steps=1, tasks=8)
    first = SavedRun("run", "run", run.path)
    sizes = [len(first.answer(f"trees/1/{number}") or b"") for number in range(8)]
    for limit in (sum(sizes), 3 * max(sizes), 1):
        monkeypatch.setattr(saved_run_module, "_KEPT_BYTES", limit)
        saved = SavedRun("run", "run", run.path)
        for _ in range(2):
            assert [len(saved.answer(f"trees/1/{number}") or b"") for number in range(8)] == sizes
        kept = [len(body) for _, body in saved._answers.values()]
        assert sum(kept) <= limit or len(kept) == 1
        assert len(kept) == {sum(sizes): 8, 1: 1}.get(limit, len(kept)) and kept[-1] == sizes[-1]


def test_an_answer_that_has_not_changed_is_not_sent_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=2)
    client = Page(tmp_path).client
    first = client.get("/api/runs/run/index")
    assert first.headers["cache-control"] == "no-cache" and first.headers["content-encoding"] == "gzip"
    same = {"if-none-match": first.headers["etag"]}
    again = client.get("/api/runs/run/index", headers=same)
    assert again.status_code == 304 and again.content == b"" and again.headers["etag"] == first.headers["etag"]
    weak = {"if-none-match": f'"other", W/{first.headers["etag"]}'}
    assert client.get("/api/runs/run/index", headers=weak).status_code == 304
    run.save_trees(3, [random_tree(np.random.default_rng(0), "new", 2, 2)])
    assert client.get("/api/runs/run/index", headers=same).status_code == 200


def test_the_page_is_served_with_what_it_loads_first(tmp_path: Path) -> None:
    make_run(tmp_path, steps=1)
    client = Page(tmp_path).client
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert 'src="mode.js"' in page.text
    mode = client.get("/mode.js")
    assert mode.headers["content-type"].startswith("text/javascript")
    assert json.loads(mode.text.removeprefix("var agentropy = ").rstrip(";\n"))["live"] is True


def test_ten_thousand_trajectories_are_told_without_opening_a_tree(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=0)
    rng = np.random.default_rng(1)
    trees = [random_tree(rng, f"task-{number}", 8, 2, forks=True) for number in range(25)]
    for step in range(1, 51):
        run.save_trees(step, trees)
    for step, path in step_files(run.path).items():
        if step != 50:  # all but the checksum at the end is lost
            data = path.read_bytes()
            path.write_bytes(bytes(len(data) - 8) + data[-8:])
    page = Page(tmp_path)
    answer = page.ask("runs/run/index")
    assert answer["count"] == 10_000 == page.run("run")["trajectories"] and not answer["unreadable"]
    assert set(answer["columns"]["step"]) == set(range(1, 51)) and len(answer["tasks"]) == 25
    assert page.ask("runs/run/trees/50/24")["task"] == "task-24"


def test_a_run_that_has_written_nothing_yet_is_told_too(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new", load_config())
    run.make()
    page = Page(tmp_path)
    told = page.run("new")
    assert (told["step"], told["success"], told["trajectories"], told["alarms"]) == (0, None, 0, [])
    assert page.ask("runs/new/metrics")["rows"] == [] and page.ask("runs/new/index")["count"] == 0
