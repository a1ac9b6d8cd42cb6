"""Compiles Triton kernels for Hopper (sm_90) on any machine, and reads what the compiler made of them.

``ptxas`` and ``cuobjdump`` come with Triton, so no GPU and no CUDA toolkit are needed. A kernel that keeps variables in
a stack frame or spills registers is slow on the device, whatever the numbers say elsewhere.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Cubin(NamedTuple):
    """What one compiled kernel uses."""

    registers: int
    """Per thread, at most 255."""
    stack: int
    """Bytes of stack frame per thread."""
    spills: int
    """Instructions that load from or store to local memory."""
    hgmma: int
    """Warp-group matrix instructions: 0 in a kernel that multiplies matrices on the slow path or not at all."""
    shared: int
    """Bytes of shared memory per block; Hopper has 227 KiB (232,448)."""


def compile_sm90(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
) -> Cubin:
    """Compile a ``@triton.jit`` function.

    Args:
        kernel: the function, not interpreted.
        signature: type of each argument that is no constant: ``"*bf16"``, ``"*fp32"``, ``"i32"``, ``"fp32"``.
            Pointers count as aligned to 16 bytes; ``"i64:16"`` is an integer that 16 divides.
        constexprs: value of each constant argument.
        num_warps: per block.
        num_stages: of software pipelining.
    """
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: i for i, name in enumerate(kernel.arg_names)}
    types = {name: signature.get(name, "constexpr").removesuffix(":16") for name in kernel.arg_names}
    divisible = [name for name, kind in signature.items() if kind.startswith("*") or kind.endswith(":16")]
    attributes = {(position[name],): [["tt.divisibility", 16]] for name in divisible}
    constants = {(position[name],): value for name, value in constexprs.items()}
    source = ASTSource(kernel, types, constants, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump(triton, "--dump-resource-usage", file)
        code = _cuobjdump(triton, "--dump-sass", file)
    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK"))
    spills, hgmma = (len(re.findall(word, code)) for word in (r"\b(?:LDL|STL)\b", r"\bHGMMA\b"))
    return Cubin(registers, stack, spills, hgmma, compiled.metadata.shared)


def _cuobjdump(triton: Any, option: str, file: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, file], capture_output=True, text=True, check=True).stdout
