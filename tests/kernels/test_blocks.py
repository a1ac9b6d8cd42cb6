"""Elementwise parts of a block: the values of plain formulas and gradients of finite differences, in every form."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from agentropy.errors import MissingDependencyError, UsageError
from agentropy.kernels.blocks import add_norm, gated, norm_linear, rotate, swiglu

sizes = st.integers(1, 7)


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()


@given(st.integers(0, 6), sizes, sizes, st.booleans(), st.integers(0, 2**31))
def test_norm_linear(tokens, hidden, width, biased, seed):
    x, scale = normal(tokens, hidden, seed=seed), normal(hidden, seed=seed + 1)
    weight, bias = normal(width, hidden, seed=seed + 2), normal(width, seed=seed + 3) if biased else None
    expected = F.linear(F.rms_norm(x, (hidden,), scale, 1e-3), weight, bias)
    torch.testing.assert_close(norm_linear(x, scale, weight, bias, 1e-3), expected)
    if tokens:
        assert gradcheck(lambda *inputs: norm_linear(*inputs, 1e-3), (x, scale, weight, bias))


@given(st.integers(1, 5), sizes, st.integers(0, 2**31))
def test_swiglu(tokens, inner, seed):
    both = normal(tokens, 2 * inner, seed=seed)
    gate, up = both.split(inner, 1)
    torch.testing.assert_close(swiglu(both), gate * torch.sigmoid(gate) * up)
    assert gradcheck(swiglu, (both,))


@given(st.integers(1, 5), sizes, sizes, st.integers(0, 2**31))
def test_rotate(tokens, heads, half, seed):
    x = normal(tokens, heads, 2 * half, seed=seed)
    angle = normal(tokens, half, seed=seed + 1).detach()
    rotation = torch.polar(torch.full_like(angle, 1.5), angle)
    even, odd = x[..., ::2], x[..., 1::2]
    cos, sin = 1.5 * angle.cos()[:, None], 1.5 * angle.sin()[:, None]
    turned = rotate(x, rotation)
    torch.testing.assert_close(turned[..., ::2], even * cos - odd * sin)
    torch.testing.assert_close(turned[..., 1::2], even * sin + odd * cos)
    assert gradcheck(lambda x: rotate(x, rotation), (x,))


@pytest.mark.parametrize("make", [swiglu, lambda x: norm_linear(x, torch.ones(6), torch.ones(4, 6), None, 1e-5)])
def test_fp32_is_close_to_float64(make):
    x = normal(9, 6, dtype=torch.float32)
    wide = x.detach().double().requires_grad_()
    out = make(x)
    with torch.no_grad():
        gate, up = wide.chunk(2, -1)
        plain = F.silu(gate) * up if make is swiglu else F.rms_norm(wide, (6,), None, 1e-5).sum(1, keepdim=True)
    torch.testing.assert_close(out.double(), plain.expand_as(out), rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["numba", "torch"])
def backend(request):
    if request.param == "numba":
        pytest.importorskip("numba", reason="numba is not installed")
    return request.param


kinds = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
RELATIVE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2**-7}


@kinds
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 16), (4, 100), (0, 8)], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_add_norm(backend, dtype, shape, size):
    x, y = ((size * normal(*shape, seed=seed).detach()).to(dtype) for seed in (0, 1))
    x[:1], y[:1] = 0, 0
    total, normed = add_norm(x, y, 1e-5, backend=backend)
    assert total.dtype == normed.dtype == dtype
    assert torch.equal(total, x + y)
    expected = total.double() / (total.double().square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normed.double(), expected, rtol=RELATIVE[dtype], atol=0)


@kinds
def test_gated(backend, dtype):
    gates = torch.tensor([0.0, -0.0, 1e-30, 1, -1, 20, -20, 80, -80, 86.9, -86.9, 87.1, -87.1, 100, -100, 1e4, -1e4])
    gates = torch.cat((gates, 5 * normal(50).detach().float())).to(dtype)
    ups = torch.tensor([1.0, -3, 0, 1e4], dtype=dtype)
    both = torch.cat((gates.expand(4, -1), ups[:, None].expand(-1, len(gates))), dim=1).contiguous()
    found = gated(both, backend=backend)
    assert found.dtype == dtype and found.isfinite().all()
    wide = gates.double()
    expected = wide * torch.sigmoid(wide) * ups.double()[:, None]
    # Below e to the -87 there is nothing in fp32.
    smallest = 0.0 if dtype == torch.float64 else 1e-31
    torch.testing.assert_close(found.double(), expected, rtol=RELATIVE[dtype], atol=smallest)
    assert not gated(both[:0], backend=backend).numel()


@kinds
def test_nan_stays_nan(backend, dtype):
    both = torch.ones(3, 8, dtype=dtype)
    both[0, 1] = both[1, 5] = torch.nan
    assert gated(both, backend=backend).isnan().nonzero().tolist() == [[0, 1], [1, 1]]
    total, normed = add_norm(both, torch.ones_like(both), 1e-5, backend=backend)
    assert total.isnan().nonzero().tolist() == [[0, 1], [1, 5]]
    assert normed[:2].isnan().all() and normed[2].isfinite().all()


def test_what_has_no_numba_form_is_for_torch():
    x = normal(4, 6, dtype=torch.float32).detach()
    for given_ in (x.half(), x.T.contiguous().T):
        plain = given_.float()
        _, normed = add_norm(given_, given_, 1e-5)
        torch.testing.assert_close(normed.float(), F.rms_norm(2 * plain, (6,), None, 1e-5), rtol=2e-3, atol=2e-3)
        gate, up = plain.chunk(2, 1)
        torch.testing.assert_close(gated(given_).float(), F.silu(gate) * up, rtol=2e-3, atol=2e-3)
        with pytest.raises((UsageError, MissingDependencyError)):
            gated(given_, backend="numba")
        with pytest.raises((UsageError, MissingDependencyError)):
            add_norm(given_, given_, 1e-5, backend="numba")
