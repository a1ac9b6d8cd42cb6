"""The built-in engine keeps the promises of every engine; vLLM keeps them in its own environment."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from agentropy.agents.engines import Engine
from agentropy.agents.engines.process_engine import ProcessEngine
from agentropy.agents.engines.torch_engine import TorchEngine

from .engine_conformance import CLAIMS, Subject, Words, tiny_model

ROOT = Path(__file__).parents[2]
VARIABLE = "AGENTROPY_VLLM_PYTHON"


@pytest.fixture(scope="module", params=["fused", "generic", "copy", "processes"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    model = tiny_model()
    if request.param == "processes":
        engine: Engine = ProcessEngine(model, Words(), workers=2, max_batch=16)
    else:
        options = {"fused": {}, "generic": {"fused": False}, "copy": {"dtype": torch.float64}}[request.param]
        engine = TorchEngine(model, Words(), max_batch=16, **options)
    yield Subject(engine, model, tolerance=1e-4, token_by_token=True)
    engine.close()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__.removeprefix("check_"))
def test_torch_engine(subject: Subject, claim: Callable[[Subject], None]) -> None:
    claim(subject)


def vllm_python() -> Path:
    """The interpreter of vLLM's environment; skips the test where there is none."""
    named = os.environ.get(VARIABLE)
    python = Path(named) if named else ROOT / ".venv-vllm" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no vLLM here: `make vllm` installs it, or {VARIABLE} names the Python of another environment")
    return python


def test_vllm_engine() -> None:
    """Its test file, which cannot run here: vLLM wants an older transformers."""
    command = [vllm_python(), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/agents/test_vllm_engine.py"]
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "vLLM is not installed" not in done.stdout, f"{done.stdout}\n{done.stderr}"[-8000:]
