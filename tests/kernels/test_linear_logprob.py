"""The fused head equals the float64 formulas on its inputs as they are, results and gradients, tile by tile."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from agentropy.errors import UsageError
from agentropy.kernels import head_tiles, linear_logprob
from agentropy.kernels.linear_logprob import fused_linear_logprob, fused_linear_policy_loss


@pytest.fixture
def generator() -> torch.Generator:
    seed = int(np.random.default_rng().integers(2**31))
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_tiles, "_TILES", {"cpu": (3, 4)})
    monkeypatch.setattr(linear_logprob, "_CHUNK_ELEMENTS", {"cpu": 24})


def plain(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    kept_ids: Tensor | None = None,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """By the definitions, with every logit in memory; in float64 where the inputs are."""
    z = (hidden if rows is None else hidden[rows]) @ weight.T
    z = z if bias is None else z + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = (z / (temperature[:, None] if isinstance(temperature, Tensor) else temperature))[:, :vocab_size]
    logp = torch.log_softmax(z, dim=-1)
    valid = target != ignore_index
    found = {
        "logprob": logp.gather(1, target.where(valid, 0)[:, None])[:, 0],
        "entropy": -torch.where(logp > -torch.inf, logp.exp() * logp.clamp_min(-1e300), 0).sum(dim=-1),
        "lse": z.logsumexp(dim=-1),
    }
    if kept_ids is not None:
        chosen = logp.gather(1, kept_ids.clamp_min(0)).masked_fill(kept_ids < 0, -torch.inf)
        found["kept_logmass"] = chosen.logsumexp(dim=-1)
    return {name: value.where(valid, 0) for name, value in found.items()}


def problem(
    generator: torch.Generator, count: int, size: int, vocabulary: int, scale: float = 1.0, dtype: Any = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(count, size, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, size, generator=generator) * scale / size**0.5).to(dtype)
    target = torch.randint(vocabulary, (count,), generator=generator)
    target[:1], target[1:2] = 0, vocabulary - 1
    return hidden, weight, target


def gradients(
    operation: Any, hidden: Tensor, weight: Tensor, target: Tensor, **options: Any
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    leaves = [each.detach().clone().requires_grad_() for each in (hidden, weight)]
    out = operation(*leaves, target, **options)
    out = out if isinstance(out, dict) else out._asdict()
    factor = torch.linspace(-1, 1, len(target), dtype=torch.float64)
    (factor * out["logprob"] + factor.flip(0) * out["entropy"]).sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    return out, leaves[0].grad, leaves[1].grad


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.parametrize("count", [0, 1, 5, 33, 1100])
@pytest.mark.parametrize(("size", "vocabulary"), [(8, 1), (72, 31), (100, 517), (16, 4099)])
def test_equals_float64_for_ragged_sizes(count: int, size: int, vocabulary: int, generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, count, size, vocabulary, 3)
    found = gradients(fused_linear_logprob, hidden, weight, target)
    exact = gradients(plain, hidden.double(), weight.double(), target)
    for name, expected in exact[0].items():
        assert found[0][name].dtype == torch.float32
        torch.testing.assert_close(found[0][name].double(), expected, atol=1e-5, rtol=0)
    assert relative(found[1], exact[1]) < 5e-6 or vocabulary == 1
    assert relative(found[2], exact[2]) < 5e-6 or vocabulary == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_do_not_round_the_logits(dtype: torch.dtype, generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 64, 96, 5000, 6, dtype)
    found = gradients(fused_linear_logprob, hidden, weight, target)
    exact = gradients(plain, hidden.double(), weight.double(), target)
    for name in ("logprob", "entropy", "lse"):
        assert float((found[0][name].detach().double() - exact[0][name].detach()).abs().max()) < 2e-5
    assert found[1].dtype == found[2].dtype == dtype
    assert max(relative(found[1], exact[1]), relative(found[2], exact[2])) < 6e-3
    rounded = torch.log_softmax((hidden @ weight.T).float(), dim=-1).gather(1, target[:, None])[:, 0]
    assert float((rounded.detach() - exact[0]["logprob"].detach()).abs().max()) > 1e-3


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [0, 1, 2, 3])
def test_gradcheck_with_every_option(options: int, generator: torch.Generator) -> None:
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((5, 6), (11, 6), (11,))
    )
    rows = torch.tensor([0, 0, 4, 2, 4, 3, 1, 1, 0])
    target = torch.tensor([0, 8, 3, -100, 3, 7, 2, 2, 6])
    kept = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in rows])
    kept[2, 1] = -1
    temperature = torch.rand(len(rows), generator=generator, dtype=torch.float64) + 0.5
    chosen: dict[str, Any] = [
        {"rows": rows},
        {"rows": rows, "kept_ids": kept},
        {"rows": rows, "temperature": temperature, "vocab_size": 9, "kept_ids": kept, "softcap": 2.0},
        {"rows": rows, "temperature": 0.7, "softcap": 1.5},
    ][options]

    def operation(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = fused_linear_logprob(hidden, weight, target, bias=bias if options % 2 else None, **chosen)
        return tuple(value for name, value in out._asdict().items() if name != "lse" and value is not None)

    assert torch.autograd.gradcheck(operation, (hidden, weight, bias))
    out = fused_linear_logprob(hidden, weight, target, bias=bias, **chosen)
    expected = plain(hidden, weight, target, bias=bias, **chosen)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(out, name), value, atol=1e-12, rtol=0)


@given(st.data())
def test_any_tiling_gives_the_same(data: st.DataObject) -> None:
    count, vocabulary = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 20))
    tokens, columns = data.draw(st.integers(1, 10)), data.draw(st.integers(1, 21))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    hidden, weight, target = problem(generator, count, 5, vocabulary, 4, torch.float64)
    expected = gradients(plain, hidden, weight, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_tiles, "_TILES", {"cpu": (tokens, columns)})
        found = gradients(fused_linear_logprob, hidden, weight, target)
    for name, value in expected[0].items():
        torch.testing.assert_close(found[0][name], value, atol=1e-12, rtol=0)
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_logits_far_from_zero(offset: float, scale: float, generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 40, 32, 1000, scale)
    bias = torch.full((1000,), offset)
    found = fused_linear_logprob(hidden, weight, target, bias=bias, temperature=0.5)
    exact = plain(hidden.double(), weight.double(), target, bias=bias.double(), temperature=0.5)
    bound = 1e-6 + 2e-7 * 2 * (abs(offset) + 5 * scale)
    for name in ("logprob", "entropy"):
        assert float((getattr(found, name).double() - exact[name]).abs().max()) <= bound


def test_padding_columns_have_no_mass_and_no_gradient(generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 20, 16, 90, 3)
    padded = torch.cat((weight, torch.full((38, 16), 1e3)))
    found = gradients(fused_linear_logprob, hidden, padded, target, vocab_size=90)
    cut = gradients(fused_linear_logprob, hidden, weight, target)
    for name in ("logprob", "entropy", "lse"):
        assert torch.equal(found[0][name], cut[0][name])
    assert torch.equal(found[1], cut[1]) and torch.equal(found[2][:90], cut[2])
    assert bool((found[2][90:] == 0).all())


def test_ignored_targets_give_zeros_and_no_gradient_even_beside_nan(generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 12, 16, 50)
    hidden[3], target[3] = torch.nan, -100
    found = gradients(fused_linear_logprob, hidden, weight, target, temperature=torch.full((12,), 0.5))
    for name in ("logprob", "entropy", "lse"):
        assert float(found[0][name][3].detach()) == 0
        assert bool(found[0][name].isfinite().all())
    assert bool((found[1][3] == 0).all()) and bool(found[2].isfinite().all())
    nothing = gradients(fused_linear_logprob, hidden, weight, torch.full_like(target, -100))
    assert not any(bool(each.any()) for each in (nothing[0]["logprob"], nothing[1], nothing[2]))


def test_a_nan_row_stays_in_its_row(generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 12, 16, 50)
    hidden[3] = torch.nan
    found = fused_linear_logprob(hidden, weight, target)
    for values in (found.logprob, found.entropy, found.lse):
        assert torch.equal(values.isnan(), torch.arange(12) == 3)


def test_a_bias_can_take_tokens_out(generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 20, 16, 5000, 3)
    bias = torch.zeros(5000)
    bias[: 2048 + 7] = -torch.inf
    kept = torch.full_like(target, 0).add_(2100)
    found = gradients(fused_linear_logprob, hidden, weight, kept, bias=bias)
    cut = gradients(fused_linear_logprob, hidden, weight[2055:], kept - 2055)
    torch.testing.assert_close(found[0]["logprob"], cut[0]["logprob"], atol=3e-6, rtol=0)
    torch.testing.assert_close(found[0]["entropy"], cut[0]["entropy"], atol=3e-6, rtol=0)
    torch.testing.assert_close(found[1], cut[1], atol=1e-5, rtol=1e-5)
    assert bool((found[2][:2055] == 0).all())


def test_branches_share_a_hidden_state(generator: torch.Generator) -> None:
    hidden, weight, _ = problem(generator, 4, 16, 50, 2)
    rows = torch.tensor([2, 2, 2, 0], dtype=torch.int32)
    target = torch.tensor([1, 7, 7, 49])
    found = gradients(fused_linear_logprob, hidden, weight, target, rows=rows)
    spread = gradients(fused_linear_logprob, hidden[rows], weight, target)
    assert torch.equal(found[0]["logprob"], spread[0]["logprob"])
    torch.testing.assert_close(found[1][2], spread[1][:3].sum(dim=0))
    assert bool((found[1][[1, 3]] == 0).all())
    torch.testing.assert_close(found[2], spread[2])


def test_identities(generator: torch.Generator) -> None:
    vocabulary = 37
    hidden, weight, _ = problem(generator, 1, 8, vocabulary, 4, torch.float64)
    rows, every = torch.zeros(vocabulary, dtype=torch.long), torch.arange(vocabulary)
    kept = torch.arange(vocabulary).expand(vocabulary, -1)
    found = fused_linear_logprob(hidden, weight, every, rows=rows, kept_ids=kept)
    assert bool((found.logprob <= 0).all()) and float(found.logprob.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert 0 <= float(found.entropy[0]) <= math.log(vocabulary)
    assert float(found.entropy[0]) == pytest.approx(-float((found.logprob.exp() * found.logprob).sum()), abs=1e-12)
    assert found.kept_logmass is not None and float(found.kept_logmass.abs().max()) < 1e-12


@pytest.mark.parametrize("need", [0, 1])
def test_what_needs_no_gradient_costs_no_product(
    need: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    hidden, weight, target = problem(generator, 12, 16, 50)
    inputs = [hidden, weight]
    inputs[need].requires_grad_()
    found = fused_linear_logprob(inputs[0], inputs[1], target)
    calls = []
    product = head_tiles.product
    monkeypatch.setattr(head_tiles, "product", lambda a, b: calls.append(1) or product(a, b))
    found.logprob.sum().backward()
    assert len(calls) == 2  # the logits again, and one gradient
    assert inputs[1 - need].grad is None and inputs[need].grad is not None


def test_without_entropy(generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 12, 16, 50)
    grads = []
    for entropy in (True, False):
        leaf = weight.clone().requires_grad_()
        found = fused_linear_logprob(hidden, leaf, target, entropy=entropy)
        found.logprob.sum().backward()
        grads.append(leaf.grad)
    assert bool(found.entropy.isnan().all())
    assert torch.equal(grads[0], grads[1])


def test_gradients_are_added_up_in_fp32_and_can_stay_so(generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 5000, 16, 40, 2, torch.bfloat16)
    exact = gradients(plain, hidden.double(), weight.double(), target)[2]
    leaf = weight.clone().requires_grad_()
    if not hasattr(leaf, "grad_dtype"):
        pytest.skip("this torch always rounds gradients to the type of the parameter")
    leaf.grad_dtype = torch.float32
    found = fused_linear_logprob(hidden, leaf, target, grad_dtype=torch.float32)
    factor = torch.linspace(-1, 1, len(target))
    (factor * found.logprob + factor.flip(0) * found.entropy).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    assert not torch.equal(leaf.grad, leaf.grad.bfloat16().float())
    assert relative(leaf.grad, exact) < 6e-3


def test_double_backward_is_refused(generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 2, 4, 5)
    hidden.requires_grad_()
    found = fused_linear_logprob(hidden, weight, target)
    (grad,) = torch.autograd.grad(found.logprob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), hidden)


def test_strided_inputs(generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 20, 16, 50)
    found = gradients(fused_linear_logprob, hidden, weight, target)
    strided = gradients(fused_linear_logprob, hidden.t().contiguous().t(), weight.t().contiguous().t(), target)
    for name in ("logprob", "entropy"):
        torch.testing.assert_close(strided[0][name], found[0][name])
    torch.testing.assert_close(strided[2], found[2])


def clipped(advantage: Tensor, old: Tensor) -> Any:
    """PPO's loss per token with an entropy bonus."""

    def loss(logprob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        ratio = (logprob - old[index]).exp()
        own = advantage[index]
        return -torch.minimum(ratio * own, ratio.clamp(0.8, 1.2) * own) - 0.01 * entropy

    return loss


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_policy_loss_equals_autograd_through_its_tokens(dtype: torch.dtype, generator: torch.Generator) -> None:
    hidden, weight, _ = problem(generator, 7, 12, 11, 2, dtype)
    rows = torch.randint(7, (10,), generator=generator)
    target = torch.randint(9, (10,), generator=generator)
    target[4] = -100
    bias = torch.randn(11, generator=generator).to(dtype)
    advantage = torch.randn(10, generator=generator, dtype=torch.float64)
    old = -2 * torch.rand(10, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {"rows": rows, "temperature": 0.8, "vocab_size": 9, "softcap": 5.0}

    leaves = [each.clone().requires_grad_() for each in (hidden, weight, bias)]
    loss, logprob, entropy = fused_linear_policy_loss(
        leaves[0], leaves[1], target, token_loss=clipped(advantage, old), bias=leaves[2], **options
    )
    (3 * loss).backward()
    exact = [each.double().detach().requires_grad_() for each in (hidden, weight, bias)]
    found = plain(exact[0], exact[1], target, bias=exact[2], **options)
    index = (target != -100).nonzero()[:, 0]
    expected = clipped(advantage, old)(found["logprob"][index], found["entropy"][index], index).sum()
    (3 * expected).backward()

    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    torch.testing.assert_close(loss.detach().double(), expected.detach(), atol=10 * tolerance, rtol=0)
    torch.testing.assert_close(logprob.double(), found["logprob"].detach(), atol=tolerance, rtol=0)
    torch.testing.assert_close(entropy.double(), found["entropy"].detach(), atol=tolerance, rtol=0)
    assert not logprob.requires_grad and not entropy.requires_grad
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and other.grad is not None
        assert leaf.grad.dtype == dtype
        # The gradient is rounded, and rounded again when it is scaled.
        assert relative(leaf.grad, other.grad) < (1e-2 if dtype == torch.bfloat16 else 10 * tolerance)


def test_the_policy_loss_without_gradient(generator: torch.Generator) -> None:
    hidden, weight, target = problem(generator, 9, 8, 30)
    with torch.no_grad():
        loss, logprob, _ = fused_linear_policy_loss(hidden, weight, target, token_loss=lambda lp, entropy, index: -lp)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, -fused_linear_logprob(hidden, weight, target).logprob.sum())
    torch.testing.assert_close(loss, -logprob.sum())


def test_bad_input_is_named() -> None:
    hidden, weight, target = torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long)
    for match, arguments, options in (
        ("hidden", (hidden, torch.zeros(5, 3), target), {}),
        ("one floating type", (hidden, weight.double(), target), {}),
        ("M = N", (hidden, weight, target[:1]), {}),
        ("rows", (hidden, weight, target), {"rows": target[:1]}),
        ("integers", (hidden, weight, target.float()), {}),
        ("target has 0 to 5", (hidden, weight, torch.tensor([0, 5])), {}),
        ("expected 0 to 3", (hidden, weight, torch.tensor([0, 4])), {"vocab_size": 4}),
        ("rows has -1", (hidden, weight, target), {"rows": torch.tensor([-1, 0])}),
        ("vocab_size is 6", (hidden, weight, target), {"vocab_size": 6}),
        ("bias", (hidden, weight, target), {"bias": torch.zeros(4)}),
        ("softcap is 0", (hidden, weight, target), {"softcap": 0.0}),
        ("temperature", (hidden, weight, target), {"temperature": -1.0}),
        ("kept_ids", (hidden, weight, target), {"kept_ids": torch.zeros(3, 1, dtype=torch.long)}),
        ("did you mean 'torch'", (hidden, weight, target), {"backend": "troch"}),
    ):
        with pytest.raises(UsageError, match=match):
            fused_linear_logprob(*arguments, **options)
    with pytest.raises(UsageError, match="one loss per token"):
        fused_linear_policy_loss(hidden, weight, target, token_loss=lambda lp, entropy, index: lp.sum())
