"""The wheel holds the whole package and nothing else, and works when it is installed alone."""

import ast
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "runs", "site"
)


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a clean copy of the sources, so that no earlier build can lend the wheel a file."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "tree", ignore=NOT_SOURCE))


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # Building leaves its own files behind: not among the sources that the tests compare with.
    copy = shutil.copytree(tree, tmp_path_factory.mktemp("build") / "tree")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("agentropy-*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of a new virtual environment that has the wheel; dependencies are this interpreter's.

    A folder named in a ``.pth`` file has its own such files ignored, so an editable installation stays out of sight.
    """
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def run_installed(installed: Path, code: str) -> str:
    """Run ``code`` with the installed wheel, away from the sources."""
    done = subprocess.run([installed, "-I", "-c", code], capture_output=True, text=True, cwd=installed.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def package_folders(tree: Path, project: dict) -> dict[str, Path]:
    names = project["tool"]["setuptools"]["packages"]
    return {name: tree.joinpath(*name.split(".")[1:]) for name in names}


def data_folders(tree: Path, project: dict) -> set[str]:
    """Folders within packages whose files are listed as data, such as those of the page of `agentropy view`."""
    listed = project["tool"]["setuptools"]["package-data"].items()
    patterns = [f"{name.replace('.', '/')}/{pattern}" for name, patterns in listed for pattern in patterns]
    return {pattern.removesuffix("/*") for pattern in patterns if pattern.endswith("/*")}


def modules_of(contents: set[str]) -> list[str]:
    files = sorted(name for name in contents if name.startswith("agentropy/") and name.endswith(".py"))
    return [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files]


def test_every_folder_with_an_init_is_a_listed_package(tree, project):
    inits = (file.parent.relative_to(tree) for file in tree.rglob("__init__.py"))
    found = {".".join(("agentropy", *folder.parts)) for folder in inits if folder.parts[:1] != ("tests",)}
    assert found == set(project["tool"]["setuptools"]["packages"])


def test_the_tests_are_no_package(tree):
    assert not list((tree / "tests").rglob("__init__.py"))


def test_the_wheel_has_every_source_file(tree, project, contents):
    folders = package_folders(tree, project)
    expected = {
        f"{name.replace('.', '/')}/{file.name}" for name, folder in folders.items() for file in folder.glob("*.py")
    }
    assert expected <= contents
    aside = {"docs", "tests", *project["build-system"].get("backend-path", [])}
    loose = {
        file.relative_to(tree)
        for folder in tree.iterdir()
        if folder.is_dir() and folder.name not in aside and not folder.name.startswith(".")
        for file in folder.rglob("*.py")
        if file.parent not in folders.values()
    }
    assert not loose, "source files in no package"


def test_the_wheel_has_every_data_file(tree, project, contents):
    expected = {"agentropy/py.typed", "agentropy/algorithms/view/static/index.html"}
    for folder in data_folders(tree, project):
        expected |= {f"{folder}/{file.name}" for file in tree.joinpath(*folder.split("/")[1:]).iterdir()}
    for name, folder in package_folders(tree, project).items():
        if name == "agentropy":
            continue  # beside the root's modules lie the project's own files, which are no package data
        for file in folder.iterdir():
            if file.is_file() and file.suffix not in (".py", ".md"):
                expected.add(f"{name.replace('.', '/')}/{file.name}")
    assert expected <= contents


def test_the_wheel_has_nothing_but_the_package(contents, tree, project):
    folders = {name.replace(".", "/") for name in package_folders(tree, project)} | data_folders(tree, project)
    strangers = {
        name
        for name in contents
        if not name.split("/")[0].endswith(".dist-info") and str(Path(name).parent) not in folders
    }
    # Python reads it at each start, and Gymnasium so learns of the environments.
    assert strangers == {"agentropy-gymnasium.pth"}
    root = {Path(name).name for name in contents if str(Path(name).parent) == "agentropy"}
    assert root == {file.name for file in tree.glob("*.py")} | {"py.typed"}


def test_the_wheel_carries_its_licence_and_entry_points(wheel, tree):
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        about = archive.read(f"{info}/METADATA").decode()
    assert licence == (tree / "LICENSE").read_text()
    assert licence.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "License-Expression: Apache-2.0" in about
    assert "agentropy = agentropy.cli:main" in entry_points
    assert "agentropy = agentropy.envs:register" in entry_points


NEEDS = {
    "agentropy.agents.engines.vllm_observer": "vllm",
    "agentropy.kernels._numba.": "numba",
    "agentropy.kernels._triton.": "triton",
}
"""Modules that are imported lazily, with the package that they cannot do without."""


def test_the_wheel_alone_imports_every_module(installed, contents):
    absent = tuple(prefix for prefix, package in NEEDS.items() if find_spec(package) is None)
    modules = [name for name in modules_of(contents) if not name.startswith(absent)]
    assert {"agentropy", "agentropy.cli", "agentropy.envs.pool"} <= set(modules)
    code = (
        "import importlib\n"
        f"for name in {modules!r}:\n"
        "    print(name, importlib.import_module(name).__file__, sep='\\t')\n"
    )
    origins = dict(line.split("\t") for line in run_installed(installed, code).splitlines() if "\t" in line)
    assert list(origins) == modules
    elsewhere = {name: file for name, file in origins.items() if not Path(file).is_relative_to(installed.parents[1])}
    assert not elsewhere, "imported from another copy of the package"


def test_gymnasium_makes_the_environments_with_nothing_imported_first(installed):
    code = (
        "import gymnasium, sys\n"
        "spec = gymnasium.make('agentropy/ALFWorld-v0').spec\n"
        "print(spec.id, sys.modules['agentropy'].__file__, 'torch' in sys.modules)\n"
    )
    name, origin, torch_loaded = run_installed(installed, code).split()
    assert name == "agentropy/ALFWorld-v0"
    assert Path(origin).is_relative_to(installed.parents[1])
    assert torch_loaded == "False"


def test_a_start_of_python_loads_little_of_the_package(installed):
    code = (
        "import sys; print(*sorted(name for name in sys.modules if name.split('.')[0] in ('agentropy', 'gymnasium')))"
    )
    assert set(run_installed(installed, code).split()) <= {"agentropy", "agentropy.registry"}


def test_uninstalling_leaves_nothing_behind(installed, tmp_path):
    home = shutil.copytree(installed.parents[1], tmp_path / "copy", symlinks=True)
    (dependencies,) = home.rglob("dependencies.pth")
    dependencies.unlink()
    command = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "uninstall", "--quiet", "-y"]
    subprocess.run([*command, "agentropy"], check=True)
    assert not list(home.rglob("*agentropy*"))


def test_the_version_is_the_same_everywhere(project, wheel):
    version = project["project"]["version"]
    source = ast.parse((ROOT / "__init__.py").read_text())
    (assigned,) = (node for node in source.body if isinstance(node, ast.Assign))
    assert ast.literal_eval(assigned.value) == version
    assert wheel.name.split("-")[1] == version


def closure(requirements: list[str], extras: frozenset[str]) -> set[str]:
    """Return every distribution that an installation of ``requirements`` brings, by the installed metadata."""
    found: set[str] = set()
    todo = [(Requirement(line), extras) for line in requirements]
    while todo:
        requirement, active = todo.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in active | {""}):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        inner = frozenset(requirement.extras)
        todo += [(Requirement(line), inner) for line in metadata.requires(requirement.name) or []]
    return found


@pytest.mark.parametrize("extra", [None, "alfworld", "all-envs", "serve"])
def test_the_environments_install_without_torch(project, extra):
    table = project["project"]
    requirements = [*table["dependencies"], *(table["optional-dependencies"][extra] if extra else [])]
    brought = closure(requirements, frozenset())
    assert {"gymnasium", "numpy"} <= brought
    assert not brought & {"torch", "transformers", "tokenizers", "triton", "numba"}


PINNED = ("train", "alfworld", "bfcl", "scienceworld", "search", "textworld", "tools", "mcp", "parquet", "serve", "dev")


def test_constraints_pin_what_the_extras_ask_for(project):
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line]
    pinned = {pin.name.lower(): pin for pin in pins}
    assert str(pinned["torch"].specifier) == "==2.13.0"
    table = project["project"]
    asked = [
        *table["dependencies"],
        *(line for extra in PINNED for line in table["optional-dependencies"][extra]),
    ]
    for requirement in map(Requirement, asked):
        if requirement.name != "agentropy":
            (pin,) = pinned[requirement.name.lower()].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), f"{requirement} but pinned to {pin}"


OLD_PYTHON = "exit 1"
NO_VENV = f'case "$*" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"'


@pytest.mark.parametrize(
    ("programs", "sentence"),
    [
        ({}, "no Python 3.11, 3.12 or 3.13 found; install one (sudo apt install python3) or name it"),
        (
            {"python3": OLD_PYTHON},
            "no Python 3.11, 3.12 or 3.13 found; install one (sudo apt install python3) or name it",
        ),
        ({"python3": OLD_PYTHON, "python3.12": NO_VENV}, "install its venv module: sudo apt install python3.12-venv"),
        ({"python3": f'exec {sys.executable} "$@"'}, "no C++ compiler found"),
    ],
    ids=["no python", "old python", "no venv", "no compiler"],
)
def test_set_up_says_in_one_sentence_what_is_missing(tree, tmp_path, programs, sentence):
    for name in ("sh", "make"):
        (tmp_path / name).symlink_to(Path(shutil.which(name)).resolve())
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["make", "setup"], cwd=tree, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert len(said) == 1
    assert sentence in said[0]
    assert not (tree / ".venv").exists()
