"""logprob_entropy equals the float64 formulas, also where naive ones overflow, and its gradient is exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from agentropy.errors import UsageError
from agentropy.kernels import logprob as module
from agentropy.kernels.logprob import logprob_entropy


def reference(logits: Tensor, target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Float64, by the definition; tokens of probability 0 add no entropy."""
    logp = torch.log_softmax(logits.double() / temperature, dim=-1)
    entropy = -torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(dim=-1)
    return logp.gather(1, target[:, None])[:, 0], entropy


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rows", [0, 1, 5, 33, 700])
@pytest.mark.parametrize("vocabulary", [1, 31, 517, 4099])
def test_equals_float64_for_ragged_sizes(rows: int, vocabulary: int, generator: torch.Generator) -> None:
    scale = 3.0
    logits = torch.randn(rows, vocabulary, generator=generator) * scale
    target = torch.randint(vocabulary, (rows,), generator=generator)
    logprob, entropy = logprob_entropy(logits, target)[:2]
    expected_logprob, expected_entropy = reference(logits, target)
    assert logprob.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprob.double(), expected_logprob, atol=5e-6, rtol=0)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=5e-6, rtol=0)


@pytest.mark.parametrize("offset", [-300.0, 0.0, 300.0])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 5.0])
def test_exact_at_large_offsets_and_any_temperature(
    offset: float, scale: float, temperature: float, generator: torch.Generator
) -> None:
    logits = torch.randn(40, 1000, generator=generator) * scale + offset
    target = torch.randint(1000, (40,), generator=generator)
    logprob, entropy = logprob_entropy(logits, target, temperature=temperature)[:2]
    expected_logprob, expected_entropy = reference(logits, target, temperature)
    largest = float(logits.abs().max()) / temperature
    bound = 1e-6 + 2e-7 * largest
    assert float((logprob.double() - expected_logprob).abs().max()) <= bound
    assert float((entropy.double() - expected_entropy).abs().max()) <= bound


def test_one_hot_rows_have_no_entropy_and_masked_tokens_add_none(generator: torch.Generator) -> None:
    peak = torch.zeros(1, 50)
    peak[0, 7] = 1e4
    logprob, entropy = logprob_entropy(peak, torch.tensor([7]))[:2]
    assert float(logprob) == 0 and float(entropy) == 0

    logits = torch.randn(8, 50, generator=generator)
    masked = torch.cat((logits, torch.full((8, 30), -torch.inf)), dim=1).requires_grad_()
    target = torch.randint(50, (8,), generator=generator)
    logprob, entropy = logprob_entropy(masked, target)[:2]
    plain_logprob, plain_entropy = logprob_entropy(logits, target)[:2]
    torch.testing.assert_close(logprob, plain_logprob)
    torch.testing.assert_close(entropy, plain_entropy)
    (1e3 * entropy.sum() + logprob.sum()).backward()
    assert masked.grad is not None
    assert bool((masked.grad[:, 50:] == 0).all()) and bool(masked.grad.isfinite().all())


def test_a_nan_row_stays_in_its_row(generator: torch.Generator) -> None:
    logits = torch.randn(5, 20, generator=generator)
    logits[2, 3] = torch.nan
    target = torch.zeros(5, dtype=torch.long)
    broken = torch.tensor([False, False, True, False, False])
    for values in logprob_entropy(logits, target)[:3]:
        assert torch.equal(values.isnan(), broken)


def test_identities(generator: torch.Generator) -> None:
    vocabulary = 37
    row = torch.randn(1, vocabulary, generator=generator, dtype=torch.float64) * 4
    every = torch.arange(vocabulary)
    logits = row.expand(vocabulary, -1).clone().requires_grad_()
    logprob, entropy = logprob_entropy(logits, every)[:2]
    assert bool((logprob <= 0).all()) and bool((entropy >= 0).all())
    assert float(entropy.detach().max()) <= math.log(vocabulary)
    assert float(logprob.detach().exp().sum()) == pytest.approx(1, abs=1e-12)
    (logprob * torch.randn(vocabulary, generator=generator)).sum().backward(retain_graph=True)
    entropy.sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.sum(dim=-1).abs().max()) < 1e-12


def test_gradcheck_with_several_chunks(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 30)
    logits = (torch.randn(7, 11, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    target = torch.tensor([0, 10, 3, 3, 5, 1, 0])
    assert torch.autograd.gradcheck(lambda z: logprob_entropy(z, target, temperature=0.7)[:2], (logits,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
def test_gradient_equals_float64_autograd(dtype: torch.dtype, tolerance: float, generator: torch.Generator) -> None:
    logits = (torch.randn(60, 300, generator=generator) * 4).to(dtype).requires_grad_()
    target = torch.randint(300, (60,), generator=generator)
    weights = torch.randn(2, 60, generator=generator, dtype=torch.float64)
    logprob, entropy = logprob_entropy(logits, target, temperature=1.3)[:2]
    (weights[0] * logprob + weights[1] * entropy).sum().backward()
    exact = logits.detach().double().requires_grad_()
    exact_logprob, exact_entropy = reference(exact, target, 1.3)
    (weights[0] * exact_logprob + weights[1] * exact_entropy).sum().backward()
    assert logits.grad is not None and exact.grad is not None
    error = (logits.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert float(error) <= tolerance


def test_strided_logits_and_row_independence(generator: torch.Generator) -> None:
    logits = torch.randn(100, 64, generator=generator).t()
    target = torch.randint(100, (64,), generator=generator)
    together = logprob_entropy(logits, target)
    for row in range(0, 64, 13):
        alone = logprob_entropy(logits[row : row + 1], target[row : row + 1])
        torch.testing.assert_close(alone[0][0], together[0][row])
        torch.testing.assert_close(alone[1][0], together[1][row])


def test_a_temperature_per_row(generator: torch.Generator) -> None:
    logits = torch.randn(6, 40, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(40, (6,), generator=generator)
    temperature = torch.tensor([0.1, 0.5, 1.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    together = logprob_entropy(logits, target, temperature=temperature)
    (grad,) = torch.autograd.grad((together.logprob + together.entropy).sum(), logits)
    for row in range(6):
        leaf = logits.detach()[row : row + 1].requires_grad_()
        alone = logprob_entropy(leaf, target[row : row + 1], temperature=float(temperature[row]))
        (alone.logprob + alone.entropy).sum().backward()
        for one, other in zip(alone[:3], together[:3], strict=True):
            torch.testing.assert_close(one[0], other[row], atol=1e-12, rtol=0)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad[0], grad[row], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exp_and_mass_of_the_most_probable(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 500)
    logits = (torch.randn(30, 200, generator=generator) * 3).to(dtype)
    target = torch.randint(200, (30,), generator=generator)
    z = logits.double() / 0.7
    for k in (1, 7, 200):
        found = logprob_entropy(logits, target, temperature=0.7, topk_mass=k)
        torch.testing.assert_close(found.lse.double(), z.logsumexp(dim=-1), atol=5e-6, rtol=0)
        assert found.topk_logmass is not None and bool((found.topk_logmass <= 0).all())
        expected = torch.log_softmax(z, dim=-1).topk(k).values.logsumexp(dim=-1)
        torch.testing.assert_close(found.topk_logmass.double(), expected, atol=5e-6, rtol=0)
    assert logprob_entropy(logits, target).topk_logmass is None


def test_the_gradient_can_take_the_place_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 100)
    hidden = torch.randn(20, 8, generator=generator).requires_grad_()
    weight = torch.randn(50, 8, generator=generator)
    target = torch.randint(50, (20,), generator=generator)
    grads = []
    for inplace in (False, True):
        hidden.grad = None
        logits = hidden @ weight.T
        found = logprob_entropy(logits, target, temperature=0.9, inplace_backward=inplace)
        kept = logits.detach().clone()
        (found.logprob - 0.1 * found.entropy).sum().backward()
        assert torch.equal(logits.detach(), kept) != inplace
        assert hidden.grad is not None
        grads.append(hidden.grad.clone())
    assert torch.equal(grads[0], grads[1])


def test_logits_that_are_needed_elsewhere_are_not_silently_overwritten(generator: torch.Generator) -> None:
    leaf = torch.randn(4, 9, generator=generator).requires_grad_()
    logits = leaf * 2
    squares = logits.square().sum()
    found = logprob_entropy(logits, torch.zeros(4, dtype=torch.long), inplace_backward=True)
    found.logprob.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.parametrize("name", ["logprob", "entropy"])
def test_the_gradient_of_one_result_alone(name: str, generator: torch.Generator) -> None:
    logits = torch.randn(5, 12, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(12, (5,), generator=generator)
    getattr(logprob_entropy(logits, target), name).sum().backward()
    exact = logits.detach().clone().requires_grad_()
    reference(exact, target)[name == "entropy"].sum().backward()
    assert logits.grad is not None and exact.grad is not None
    torch.testing.assert_close(logits.grad, exact.grad, atol=1e-12, rtol=1e-12)


def test_double_backward_is_refused() -> None:
    logits = torch.zeros(1, 3, requires_grad=True)
    logprob, _ = logprob_entropy(logits, torch.tensor([1]))[:2]
    (grad,) = torch.autograd.grad(logprob.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), logits)


def test_bad_input_is_named() -> None:
    logits, target = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(UsageError, match="expected"):
        logprob_entropy(logits, target[:1])
    with pytest.raises(UsageError, match="temperature"):
        logprob_entropy(logits, target, temperature=0)
    for temperature in (torch.ones(3), torch.tensor([1.0, 0.0]), torch.ones(2, dtype=torch.long)):
        with pytest.raises(UsageError, match="temperature"):
            logprob_entropy(logits, target, temperature=temperature)
    with pytest.raises(UsageError, match="topk_mass is 4; expected 0 to 3"):
        logprob_entropy(logits, target, topk_mass=4)
    with pytest.raises(UsageError, match="inplace_backward"):
        logprob_entropy(logits[:1].expand(2, 3), target, inplace_backward=True)
    with pytest.raises(UsageError, match="did you mean 'torch'"):
        logprob_entropy(logits, target, backend="troch")  # type: ignore[arg-type]
