"""The form that runs is the one asked for, and what cannot run is refused with a way out."""

from __future__ import annotations

import pytest
import torch

from agentropy.errors import MissingDependencyError, UsageError
from agentropy.kernels import dispatch
from agentropy.kernels.dispatch import resolve
from tests.kernels.aot import compile_sm90
from tests.kernels.interpreter import run_interpreted


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_is_torch_on_the_cpu() -> None:
    assert resolve("auto", torch.zeros(1)) == resolve("auto") == resolve("torch", torch.zeros(1)) == "torch"


def test_auto_is_numba_on_the_cpu_where_there_is_such_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda name: True)
    tensor = torch.zeros(1)
    assert resolve("auto", tensor, numba=True) == resolve("numba", tensor, numba=True) == "numba"
    assert resolve("torch", tensor, numba=True) == "torch"
    assert resolve("auto", tensor, torch.zeros(1, device="meta"), numba=True) == "torch"
    monkeypatch.setenv("KERNELS_BACKEND", "torch")
    assert resolve("auto", tensor, numba=True) == "torch"
    assert resolve("numba", tensor, numba=True) == "numba"


def test_without_a_numba_form_the_environment_means_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda name: True)
    monkeypatch.setenv("KERNELS_BACKEND", "numba")
    tensor, elsewhere = torch.zeros(1), torch.zeros(1, device="meta")
    assert resolve("auto", tensor, numba=True) == "numba"
    assert resolve("auto", tensor) == resolve("auto", elsewhere, numba=True) == "torch"
    for wrong, numba in ((tensor, False), (elsewhere, True)):
        with pytest.raises(UsageError, match="use backend 'auto'"):
            resolve("numba", wrong, numba=numba)


def test_missing_numba_is_told_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda name: name != "numba")
    tensor = torch.zeros(1)
    assert resolve("auto", tensor, numba=True) == "torch"
    with pytest.raises(MissingDependencyError, match="pip install numba"):
        resolve("numba", tensor, numba=True)
    monkeypatch.setenv("KERNELS_BACKEND", "numba")
    with pytest.raises(MissingDependencyError, match="pip install numba"):
        resolve("auto", tensor, numba=True)


def test_auto_is_triton_where_every_tensor_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    capable = torch.zeros(1)
    monkeypatch.setattr(dispatch, "_capable", lambda tensor: tensor is capable)
    monkeypatch.setattr(dispatch, "_installed", lambda name: True)
    assert resolve("auto", capable, capable) == "triton"
    assert resolve("auto", capable, torch.zeros(1)) == "torch"
    monkeypatch.setattr(dispatch, "_installed", lambda name: False)
    assert resolve("auto", capable) == "torch"
    with pytest.raises(MissingDependencyError, match="pip install triton"):
        resolve("triton", capable)


def test_the_environment_decides_for_auto_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda name: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("KERNELS_BACKEND", "triton")
    assert resolve("auto", torch.zeros(1)) == "triton"
    assert resolve("torch", torch.zeros(1)) == "torch"
    monkeypatch.setenv("KERNELS_BACKEND", "tritn")
    with pytest.raises(UsageError, match=r"KERNELS_BACKEND.*did you mean 'triton'"):
        resolve("auto", torch.zeros(1))


def test_what_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_installed", lambda name: True)
    with pytest.raises(UsageError, match="TRITON_INTERPRET"):
        resolve("triton", torch.zeros(1))
    with pytest.raises(UsageError, match="did you mean 'torch'"):
        resolve("troch")  # type: ignore[arg-type]


def test_kernels_are_interpreted_on_the_cpu() -> None:
    run_interpreted("interpreted_dispatch", timeout=120)


def test_a_kernel_compiles_for_hopper_without_a_gpu() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.kernels.interpreted_dispatch import double

    signature = {"source": "*fp32", "target": "*fp32", "size": "i32:16"}
    made = compile_sm90(double, signature, {"BLOCK": 1024}, num_warps=4, num_stages=1)
    assert 0 < made.registers < 255
    assert (made.stack, made.spills, made.hgmma, made.shared) == (0, 0, 0, 0)
