"""The Triton forms of segment operations agree with the torch forms, and compile for Hopper without spills."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.kernels.aot import compile_sm90
from tests.kernels.interpreter import run_interpreted


def test_both_forms_agree_in_the_interpreter() -> None:
    run_interpreted("interpreted_segments")


def assert_lean(name: str, signature: Mapping[str, str], constants: Mapping[str, Any]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from agentropy.kernels._triton import segments

    made = compile_sm90(getattr(segments, name), signature, {**constants, "BLOCK": segments.BLOCK})
    assert (made.stack, made.spills) == (0, 0)
    assert made.registers <= 255 and made.shared <= 232448


@pytest.mark.parametrize("x", ["*fp32", "*fp64"])
@pytest.mark.parametrize("offsets", ["*i64", "*i32"])
def test_segment_kernels_compile_without_spills(x: str, offsets: str) -> None:
    given = {"x": x, "offsets": offsets, "out": x}
    for operation in ("sum", "mean", "max"):
        assert_lean("reduce_kernel", given, {"OPERATION": operation})
    for divide in (True, False):
        assert_lean("normalise_kernel", given, {"EPS": 1e-6, "DIVIDE": divide})
    for values, turns in ((False, False), (True, False), (True, True)):
        pointers = {"r": x, "v": x, "boundary": "*u8" if turns else x, "offsets": offsets, "out": x}
        assert_lean("scan_kernel", pointers, {"GAMMA": 0.97, "DECAY": 0.9, "VALUES": values, "TURNS": turns})


@pytest.mark.parametrize("logp", ["*fp32", "*bf16", "*fp64"])
def test_the_selection_compiles_without_spills(logp: str) -> None:
    signature = {
        "logp": logp,
        "adv": "*fp32",
        "mask": "*u8",
        "candidates": "*u8",
        "counters": "*i64",
        "keys": "*i64",
        "picked": "*u8",
        "size": "i32",
        "begin": "i64",
    }
    assert_lean("pick_kernel", signature, {"RATIO": 2e-4, "LOW": 1.0, "HIGH": 5.0, "PIVOTS": 8})
