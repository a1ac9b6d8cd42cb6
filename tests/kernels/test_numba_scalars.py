"""Scalars of the numba forms: exp is that of the C library within two units in the last place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

numba = pytest.importorskip("numba", reason="numba is not installed")

from agentropy.kernels._numba.scalars import FAST, exp  # noqa: E402


def _exps(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = exp(x[i])


@pytest.fixture(scope="module", params=[False, FAST], ids=["strict", "fast"])
def exps(request: pytest.FixtureRequest) -> Any:
    return numba.njit(fastmath=request.param, error_model="numpy")(_exps)


def found(exps: Any, x: NDArray[Any]) -> NDArray[Any]:
    out = np.full_like(x, 7)
    exps(x, out)
    return out


def test_exp_is_within_two_units_in_the_last_place(exps: Any) -> None:
    x = np.concatenate((np.linspace(-87, 0, 1_000_001), -np.geomspace(1e-38, 1, 10_001))).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    unit = np.spacing(expected.astype(np.float32)).astype(np.float64)
    assert (np.abs(found(exps, x) - expected) / unit).max() <= 2


def test_exp_is_one_at_zero_and_nothing_far_below(exps: Any) -> None:
    for dtype in (np.float32, np.float64):
        ones = found(exps, np.array([0.0, -0.0], dtype=dtype))
        assert ones.dtype == dtype and ones.tolist() == [1, 1]
        assert found(exps, np.array([-np.inf, -1e38, -1e4, -800], dtype=dtype)).tolist() == [0, 0, 0, 0]
    assert found(exps, np.array([-87.01, -88, -104], dtype=np.float32)).tolist() == [0, 0, 0]


def test_exp_of_double_is_that_of_the_library(exps: Any) -> None:
    x = np.linspace(-740, 0, 10_001)
    np.testing.assert_allclose(found(exps, x), np.exp(x), rtol=1e-15)


def test_exp_of_nan_is_nan(exps: Any) -> None:
    for dtype in (np.float32, np.float64):
        assert np.isnan(found(exps, np.array([np.nan], dtype=dtype))).all()
