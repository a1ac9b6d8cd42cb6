"""The doctor finds what is there, names what is not with its cure, and survives whatever it looks at."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from rich.console import Console

from agentropy import doctor
from agentropy.doctor import Check, diagnose, main


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def printed() -> tuple[int, str]:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    status = main(console)
    console.file.close()
    return status, console.export_text()


@pytest.fixture
def quick_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the two seconds that torch takes to load where the test is about something else."""
    monkeypatch.setattr(doctor, "TORCH_PROBE", "print('not asked')")


def test_this_machine_can_train():
    checks = by_name(diagnose())
    unfit = {name: check for name, check in checks.items() if check.required and check.status != "ok"}
    assert not unfit
    assert {"python", "machine", "torch", "planner", "java", "chromium", "extra train"} <= checks.keys()
    assert metadata.version("torch") in checks["torch"].detail
    assert checks["planner"].detail.endswith("libdownward.so")


def test_the_command_prints_every_check_and_succeeds():
    command = [sys.executable, "-m", "agentropy", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "agentropy train can run" in done.stdout
    for check in diagnose():
        assert check.name in done.stdout


def test_it_asks_other_processes_and_loads_nothing_heavy_itself():
    code = "import sys; from agentropy.doctor import diagnose; diagnose(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.usefixtures("quick_torch")
def test_without_programs_on_the_path_they_are_missing_and_training_still_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    checks = by_name(diagnose())
    for name in ("compiler", "cmake", "chromium"):
        assert checks[name].status == "missing"
    assert checks["compiler"].fix == "sudo apt install g++"
    assert checks["torch"].status == "ok"
    assert main(Console(file=open(os.devnull, "w"))) == 0  # noqa: SIM115


@pytest.mark.usefixtures("quick_torch")
def test_absent_packages_are_named_with_the_command_that_installs_them(monkeypatch):
    installed = metadata.version

    def version(package: str) -> str:
        if package in ("transformers", "safetensors"):
            raise metadata.PackageNotFoundError(package)
        return installed(package)

    monkeypatch.setattr(metadata, "version", version)
    check = by_name(diagnose())["extra train"]
    assert check == Check(
        "extra train", "missing", "not installed: safetensors, transformers", "pip install 'agentropy[train]'"
    )
    status, text = printed()
    assert status == 1
    assert "agentropy train cannot run yet: extra train" in text
    assert "pip install 'agentropy[train]'" in text


@pytest.mark.usefixtures("quick_torch")
def test_an_outdated_package_is_broken_and_says_what_is_needed(monkeypatch):
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "4.1" if name == "transformers" else installed(name))
    check = by_name(diagnose())["extra train"]
    assert check.status == "broken"
    assert "transformers 4.1 (needs >=" in check.detail


@pytest.mark.parametrize(
    ("body", "symptom"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("import os; os.abort()", "status -6"),
    ],
    ids=["does not import", "ends the process"],
)
def test_a_torch_that_does_not_load_is_broken(monkeypatch, tmp_path, body, symptom):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = by_name(diagnose())["torch"]
    assert check.status == "broken"
    assert symptom in check.detail
    assert main(Console(file=open(os.devnull, "w"))) == 1  # noqa: SIM115


def test_a_probe_that_hangs_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(doctor, "TORCH_PROBE", "import time; time.sleep(60)")
    check = by_name(diagnose())["torch"]
    assert (check.status, check.detail) == ("broken", "gave no answer in 0.2 s")


@pytest.mark.usefixtures("quick_torch")
def test_a_failing_check_becomes_a_finding(monkeypatch):
    def refuse(name: str) -> None:
        raise RuntimeError("no look-up today")

    monkeypatch.setattr(doctor, "find_spec", refuse)
    checks = by_name(diagnose())
    assert checks["torch"].status == "broken"
    assert "no look-up today" in checks["torch"].detail
    assert printed()[0] == 1


@pytest.mark.usefixtures("quick_torch")
def test_alfworld_data_is_checked_where_the_variable_points(monkeypatch, tmp_path):
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    assert by_name(diagnose())["ALFWORLD_DATA"].status == "missing"
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    assert by_name(diagnose())["ALFWORLD_DATA"].status == "broken"
    for split in ("train", "valid_seen"):
        (Path(tmp_path) / "json_2.1.1" / split).mkdir(parents=True)
    check = by_name(diagnose())["ALFWORLD_DATA"]
    assert check.status == "ok"
    assert check.detail.endswith("train, valid_seen")
