"""Claims about the Triton form of ``logprob_entropy``; run by ``test_logprob_triton.py``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from agentropy.kernels._triton import logprob as kernels
from agentropy.kernels.logprob import logprob_entropy


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernels leave unwritten is NaN."""
    empty, empty_like = torch.empty, torch.empty_like
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: _nan(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: _nan(empty_like(*args, **kwargs)))


def _nan(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def exact(logits: Tensor, target: Tensor, temperature: float | Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """Float64 autograd: log-probability, entropy, log-sum-exp and the gradient of their weighted sum."""
    z = logits.detach().double().requires_grad_()
    tempered = z / (temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature)
    logp = torch.log_softmax(tempered, dim=-1)
    logprob = logp.gather(1, target[:, None].long())[:, 0]
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp.clamp_min(-1e300), 0).sum(dim=-1)
    (weights[0] * logprob + weights[1] * entropy).sum().backward()
    assert z.grad is not None
    return logprob.detach(), entropy.detach(), tempered.detach().logsumexp(dim=-1), z.grad


def compare(
    logits: Tensor, target: Tensor, temperature: float | Tensor, generator: torch.Generator, gradient: float = 2e-6
) -> None:
    weights = torch.randn(2, len(target), generator=generator, dtype=torch.float64)
    leaf = logits.detach().requires_grad_()
    found = logprob_entropy(leaf, target, temperature=temperature, backend="triton")
    logprob, entropy, lse, grad = exact(logits, target, temperature, weights)
    coldest = float(temperature.min()) if isinstance(temperature, Tensor) else temperature
    bound = 1e-6 + 4e-7 * float(logits.abs().max()) / coldest if len(target) else 0
    for got, expected in ((found.logprob, logprob), (found.entropy, entropy), (found.lse, lse)):
        assert got.dtype == torch.float32
        assert bool(((got.detach().double() - expected).abs() <= bound).all())
    (weights[0] * found.logprob + weights[1] * found.entropy).sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.isfinite().all())
    if len(target):
        size = 1 + float(logits.abs().max()) / coldest / 30
        assert float((leaf.grad.double() - grad).norm()) <= size * gradient * float(grad.norm()) + 1e-9


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("vocabulary", [1, 31, 2048, 4099])
def check_equals_float64_for_ragged_sizes(rows: int, vocabulary: int, generator: torch.Generator) -> None:
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    target = torch.randint(vocabulary, (rows,), generator=generator)
    target[:1], target[1:2] = 0, vocabulary - 1
    compare(logits, target, 1.0, generator)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def check_exact_at_large_offsets_and_a_temperature_per_row(
    offset: float, scale: float, generator: torch.Generator
) -> None:
    logits = torch.randn(6, 3000, generator=generator) * scale + offset
    target = torch.randint(3000, (6,), generator=generator, dtype=torch.int32)
    compare(logits, target, torch.tensor([0.3, 0.7, 1.0, 1.0, 2.0, 5.0]), generator)


def check_bfloat16_rounds_the_gradient_alone(generator: torch.Generator) -> None:
    logits = (torch.randn(4, 5000, generator=generator) * 4).bfloat16()
    # The interpreter truncates where it stores 16-bit floats.
    compare(logits, torch.randint(5000, (4,), generator=generator), 1.3, generator, gradient=2**-7)


def check_strided_logits(generator: torch.Generator) -> None:
    logits = torch.randn(900, 7, generator=generator).t()
    compare(logits, torch.randint(900, (7,), generator=generator), 1.0, generator)


def check_masked_tokens_peaks_and_nan_rows(generator: torch.Generator) -> None:
    logits = torch.randn(4, 5000, generator=generator)
    logits[0, 2500:] = -torch.inf
    logits[1, :4500] = -torch.inf
    logits[2] = 0
    logits[2, 7] = 1e4
    logits[3, 4000] = torch.nan
    target = torch.tensor([1, 4700, 7, 0])
    leaf = logits.clone().requires_grad_()
    found = logprob_entropy(leaf, target, backend="triton")
    logp = torch.log_softmax(logits[:2].double(), dim=-1)
    expected = -torch.where(logp > -torch.inf, logp.exp() * logp, 0).sum(dim=-1)
    torch.testing.assert_close(found.entropy[:2].double(), expected, atol=5e-6, rtol=0)
    assert float(found.logprob[2]) == float(found.entropy[2]) == 0
    assert bool(found.logprob[3].isnan()) and bool(found.entropy[3].isnan())
    (found.logprob + 1e3 * found.entropy).sum().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad[0, 2500:] == 0).all()) and bool((leaf.grad[1, :4500] == 0).all())
    assert bool(leaf.grad[:3].isfinite().all())


def check_the_gradient_can_take_the_place_of_the_logits(generator: torch.Generator) -> None:
    logits = torch.randn(3, 2500, generator=generator)
    target = torch.randint(2500, (3,), generator=generator)
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        found = logprob_entropy(leaf * 1.0, target, inplace_backward=inplace, backend="triton")
        (found.logprob - 0.1 * found.entropy).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])


def check_a_row_alone_is_the_same_bit_for_bit(generator: torch.Generator) -> None:
    logits = torch.randn(9, 5000, generator=generator) * 5
    target = torch.randint(5000, (9,), generator=generator)
    together = logprob_entropy(logits, target, temperature=0.7, backend="triton")
    alone = logprob_entropy(logits[4:5], target[4:5], temperature=0.7, backend="triton")
    for one, all_ in zip(alone[:3], together[:3], strict=True):
        assert torch.equal(one[0], all_[4])


def check_a_gradient_of_one_result_alone(generator: torch.Generator) -> None:
    logits = torch.randn(3, 300, generator=generator)
    target = torch.randint(300, (3,), generator=generator)
    for name in ("logprob", "entropy"):
        grads = []
        for backend in ("torch", "triton"):
            leaf = logits.clone().requires_grad_()
            getattr(logprob_entropy(leaf, target, backend=backend), name).sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-5)


def check_a_target_outside_reads_nothing() -> None:
    statistics = kernels.forward(torch.zeros(2, 10), torch.tensor([-1, 10]), torch.ones(2))
    assert bool(statistics[0].isnan().all()) and bool(statistics[1].isfinite().all())
