"""Linear layers through oneDNN: the values and gradients of torch's own, inside a context and after it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from agentropy.kernels import linear as module
from agentropy.kernels.linear import linear, onednn_linear, product

needs_onednn = pytest.mark.skipif(not module.available(), reason="this torch has no oneDNN")


def tensors(shape, width, bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, requires_grad=True)
    weight = torch.randn(width, shape[-1], generator=generator, requires_grad=True)
    return x, weight, torch.randn(width, generator=generator, requires_grad=True) if bias else None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (3, 4, 16), (2, 2, 3, 33), (0, 8), (1, 0, 8)])
@pytest.mark.parametrize("width", [1, 24, 100])
def test_values_and_gradients_are_those_of_float64(shape, width, bias):
    inputs = [each for each in tensors(shape, width, bias) if each is not None]
    wide = [each.detach().double().requires_grad_() for each in inputs]
    out, expected = linear(*inputs), F.linear(*wide)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    expected.backward(grad.double())
    for one, other in zip(inputs, wide, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-4)


def test_what_needs_no_gradient_gets_none():
    x, weight, bias = tensors((4, 6), 3, True)
    linear(x.detach(), weight, bias.detach()).sum().backward()
    assert x.grad is None and bias.grad is None and weight.grad is not None


def test_strided_inputs():
    x, weight, _ = tensors((12, 6), 4, False)
    torch.testing.assert_close(linear(x[::2], weight), x[::2] @ weight.T)
    torch.testing.assert_close(
        product(x.detach().T, weight.detach()[:, :1].expand(-1, 12)), x.T @ weight[:, :1].expand(-1, 12).T
    )


def test_other_types_are_torchs_own():
    x, weight, _ = tensors((4, 6), 3, False)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(linear(x.to(dtype), weight.to(dtype)), F.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


@needs_onednn
def test_a_model_in_the_context_is_the_model(monkeypatch):
    """The layers of a module are taken, tied weights too, and nothing else is; the mode ends with the block."""
    calls = []
    plain = module.product
    monkeypatch.setattr(module, "product", lambda *args: calls.append(1) or plain(*args))
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 9, bias=False))
    net[3].weight = net[0].weight
    ids = torch.arange(9)[None]
    found = []
    for inside in (False, True):
        net.zero_grad()
        if inside:
            with onednn_linear():
                out = net(ids)
            assert len(calls) == 2
        else:
            out = net(ids)
            assert not calls
        out.logsumexp(-1).sum().backward()
        found.append([out.detach(), *(parameter.grad.clone() for parameter in net.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert len(calls) == 6
    net(ids)
    assert len(calls) == 6


def test_a_second_derivative_is_refused():
    x, weight, _ = tensors((4, 6), 3, False)
    if not module.available():
        pytest.skip("this torch has no oneDNN")
    (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
