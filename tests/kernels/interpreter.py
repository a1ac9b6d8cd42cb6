"""Runs claims about Triton kernels on the CPU, in Triton's interpreter.

``TRITON_INTERPRET`` must be set before the kernels are imported, so the claims run in a process of their own: they are
the functions ``check_*`` of a module ``tests/kernels/interpreted_*.py``, collected by pytest, which fixtures and marks
work for. What the interpreter does not model: races, alignment, shared memory, 32-bit overflow of arguments. It
multiplies 16-bit floats wrongly and truncates where they are stored.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

FOLDER = Path(__file__).parent


def run_interpreted(module: str, timeout: float = 300) -> None:
    """Run the ``check_*`` functions of ``tests/kernels/<module>.py``; fail with their output unless all pass.

    Skips where Triton is absent, or cannot interpret beside this NumPy.
    """
    pytest.importorskip("triton", reason="Triton is not installed")
    triton, numpy = (Version(importlib.metadata.version(name)) for name in ("triton", "numpy"))
    if triton < Version("3.7") and numpy >= Version("2.4"):
        pytest.skip(f"the interpreter of Triton {triton} fails with NumPy {numpy}")
    file = FOLDER / f"{module}.py"
    assert file.is_file(), file
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("KERNELS_BACKEND", None)
    collect = ("-o", "python_functions=check_*", "-o", f"python_files={file.name}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *collect, str(file)]
    done = subprocess.run(
        command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
