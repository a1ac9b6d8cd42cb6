"""Elementwise parts of a block: the values of plain formulas and gradients of finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from agentropy.kernels.blocks import norm_linear, rotate, swiglu

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
