"""Claims about the Triton form of ``fused_linear_logprob``; run by ``test_linear_logprob_triton.py``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from agentropy.kernels._triton import linear_logprob as kernels
from agentropy.kernels.linear_logprob import fused_linear_logprob, fused_linear_policy_loss


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def small_tiles_and_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that small shapes do not fit, and NaN in whatever the kernels leave unwritten."""
    monkeypatch.setattr(kernels, "TILES", {2: kernels.Tile(16, 32, 16, 4, 1), 4: kernels.Tile(32, 16, 16, 4, 1)})
    monkeypatch.setattr(kernels, "SPLIT", 64)
    monkeypatch.setattr(kernels, "SLICE", 96)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(torch.nan))


def double(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach().double().requires_grad_() if tensor is not None and tensor.is_floating_point() else tensor


def compare(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options: Any) -> None:
    """The Triton form against the torch form in float64, results and gradients."""
    tolerance = options.pop("tolerance", 1e-5)
    weights = torch.linspace(-1, 1, len(target), dtype=torch.float64)
    found = []
    for backend, leaves in (
        ("triton", [None if each is None else each.detach().requires_grad_() for each in (hidden, weight, bias)]),
        ("torch", [double(each) for each in (hidden, weight, bias)]),
    ):
        own = {key: double(value) if backend == "torch" and torch.is_tensor(value) else value
               for key, value in options.items()}  # fmt: skip
        if torch.is_tensor(own.get("temperature")):
            own["temperature"] = own["temperature"].detach()
        out = fused_linear_logprob(leaves[0], leaves[1], target, bias=leaves[2], backend=backend, **own)
        loss = (weights * out.logprob).sum()
        if options.get("entropy", True):
            loss = loss + (weights.flip(0) * out.entropy).sum()
        if out.kept_logmass is not None:
            loss = loss - (weights.abs() * out.kept_logmass).sum()
        loss.backward()
        found.append((out, [None if leaf is None else leaf.grad for leaf in leaves]))
    (out, grads), (exact, exact_grads) = found
    for got, expected in zip(out, exact, strict=True):
        if got is not None:
            # A bias of its own rounds nothing here: bf16 operands are multiplied in fp32.
            torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=0, equal_nan=True)
    for got, expected in zip(grads, exact_grads, strict=True):
        if got is not None:
            assert bool(got.isfinite().all())
            assert float((got.double() - expected).norm()) <= tolerance * float(expected.norm()) + 1e-9


@pytest.mark.parametrize("count", [0, 1, 33])
@pytest.mark.parametrize(("size", "vocabulary"), [(8, 1), (16, 31), (72, 97), (48, 200)])
def check_equals_float64_for_ragged_sizes(count: int, size: int, vocabulary: int, generator: torch.Generator) -> None:
    hidden = torch.randn(count, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator)
    target = torch.randint(vocabulary, (count,), generator=generator)
    target[:1], target[1:2] = 0, vocabulary - 1
    compare(hidden, weight, target)


def check_everything_at_once(generator: torch.Generator) -> None:
    hidden = torch.randn(20, 40, generator=generator)
    weight = torch.randn(210, 40, generator=generator) * 0.5
    bias = torch.randn(210, generator=generator)
    rows = torch.randint(20, (35,), generator=generator)
    target = torch.randint(201, (35,), generator=generator)
    target[5] = -100
    kept = torch.stack([torch.randperm(201, generator=generator)[:9] for _ in range(35)])
    kept[3, 4:] = -1
    temperature = torch.rand(35, generator=generator) + 0.5
    compare(
        hidden, weight, target, bias, rows=rows, temperature=temperature, vocab_size=201, softcap=8.0, kept_ids=kept
    )
    compare(hidden, weight, target, rows=rows, temperature=0.6, kept_ids=kept, entropy=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def check_16_bit_inputs_round_the_gradients_alone(dtype: torch.dtype, generator: torch.Generator) -> None:
    hidden = torch.randn(30, 48, generator=generator).to(dtype)
    weight = torch.randn(150, 48, generator=generator).to(dtype)
    compare(hidden, weight, torch.randint(150, (30,), generator=generator), tolerance=2**-7 + 2**-8)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def check_logits_far_from_zero(offset: float, generator: torch.Generator) -> None:
    """Also where all are far below zero: no maximum starts there, and padding counts as nothing."""
    hidden = torch.randn(10, 16, generator=generator)
    weight = torch.randn(130, 16, generator=generator)
    bias = torch.full((130,), offset)
    target = torch.randint(130, (10,), generator=generator)
    plain = fused_linear_logprob(hidden, weight, target, backend="triton")
    moved = fused_linear_logprob(hidden, weight, target, bias=bias, backend="triton")
    torch.testing.assert_close(moved.logprob, plain.logprob, atol=2e-4, rtol=0)
    torch.testing.assert_close(moved.entropy, plain.entropy, atol=2e-4, rtol=0)


def check_tokens_without_probability(generator: torch.Generator) -> None:
    hidden = torch.randn(5, 16, generator=generator)
    weight = torch.randn(200, 16, generator=generator)
    bias = torch.zeros(200)
    bias[:100] = -torch.inf
    target = torch.randint(100, (5,), generator=generator)
    masked = fused_linear_logprob(hidden, weight, target + 100, bias=bias, backend="triton")
    cut = fused_linear_logprob(hidden, weight[100:], target, backend="triton")
    torch.testing.assert_close(masked.logprob, cut.logprob, atol=2e-6, rtol=0)
    torch.testing.assert_close(masked.entropy, cut.entropy, atol=2e-6, rtol=0)


def check_a_row_alone_is_the_same_bit_for_bit(generator: torch.Generator) -> None:
    hidden = torch.randn(50, 24, generator=generator)
    weight = torch.randn(150, 24, generator=generator)
    target = torch.randint(150, (50,), generator=generator)
    hidden[3] = torch.nan
    together = fused_linear_logprob(hidden, weight, target, backend="triton")
    assert bool(together.logprob[3].isnan()) and int(together.logprob.isnan().sum()) == 1
    for row in (0, 17, 49):
        # The interpreter multiplies with NumPy, whose sums depend on the shape: the same shape, other rows zero.
        lonely = torch.zeros_like(hidden)
        lonely[row] = hidden[row]
        alone = fused_linear_logprob(lonely, weight, target, backend="triton")
        assert torch.equal(alone.logprob[row], together.logprob[row])
        assert torch.equal(alone.entropy[row], together.entropy[row])


def check_only_the_gradients_that_are_needed_are_made(generator: torch.Generator) -> None:
    hidden = torch.randn(6, 16, generator=generator)
    weight = torch.randn(20, 16, generator=generator)
    target = torch.randint(20, (6,), generator=generator)
    both = [each.clone().requires_grad_() for each in (hidden, weight)]
    fused_linear_logprob(both[0], both[1], target, backend="triton").logprob.sum().backward()
    one = weight.clone().requires_grad_()
    fused_linear_logprob(hidden, one, target, backend="triton").logprob.sum().backward()
    assert torch.equal(one.grad, both[1].grad)


def check_the_policy_loss_uses_the_row_kernels(generator: torch.Generator) -> None:
    advantage = torch.randn(12, generator=generator)
    found = []
    for backend in ("torch", "triton"):
        generator.manual_seed(1)
        hidden = torch.randn(12, 16, generator=generator).requires_grad_()
        weight = torch.randn(70, 16, generator=generator).requires_grad_()
        target = torch.randint(70, (12,), generator=generator)

        def loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
            return -logprob.exp() * advantage[index] - 0.01 * entropy

        value, logprob, entropy = fused_linear_policy_loss(
            hidden, weight, target, token_loss=loss, temperature=0.8, softcap=9.0, backend=backend
        )
        value.backward()
        found.append((value.detach(), logprob, entropy, hidden.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
