"""Log-probability and entropy straight from hidden states: the language model's head without its logits in memory.

- ``LinearLogprob``, ``fused_linear_logprob``: of given tokens, differentiable in hidden states, weight and bias.
- ``fused_linear_policy_loss``: a loss that is a sum over tokens, with its gradients formed while the logits live.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UsageError
from . import head_tiles
from .dispatch import Backend, Form, resolve
from .head_tiles import Head
from .logprob import check_temperature, inverse_temperature, row_gradient, row_statistics

TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logprob[c], entropy[c], index int64[c]) to the losses [c] of those tokens, given by their places in ``target``."""

_CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Logits that ``fused_linear_policy_loss`` holds at a time: 128 MB in fp32, or 1 GB on a GPU."""


class LinearLogprob(NamedTuple):
    """One entry per target, fp32 (float64 for float64 inputs), in nats; 0 where the target is ignored."""

    logprob: Tensor
    """Of the target. Differentiable."""
    entropy: Tensor
    """Differentiable; NaN throughout where ``entropy=False`` left it out."""
    lse: Tensor
    """log of the sum of exp(logits / temperature), after bias and soft cap."""
    kept_logmass: Tensor | None
    """log of the mass of ``kept_ids``, <= 0; ``logprob - kept_logmass`` is the log-probability among them.
    Differentiable; ``None`` without ``kept_ids``."""


def fused_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    entropy: bool = True,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    kept_ids: Tensor | None = None,
    grad_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> LinearLogprob:
    """Return log-probability and entropy of softmax(cap(hidden @ weight.T + bias) / temperature) for each target.

    The logits exist a tile at a time, in fp32 whatever the input type: rounding them to bf16 would move more than half
    of all token ratios by over 1%. The forward pass keeps running maximum, sum and weighted sum per row; the backward
    pass recomputes the tiles and forms dz = g_lp (onehot - p) - g_H p (log p + H) from them, so both passes cost four
    products in all and memory for one tile. Gradients are accumulated in fp32 and rounded once. Each product with
    16-bit inputs that the gradients need takes dz rounded to that type. On the CPU logits of 16-bit inputs come from
    operands widened tile by tile, for want of a product that widens only its result; float16 is widened throughout.

    Args:
        hidden: [N, H] float64, float32, bfloat16 or float16; contiguous rows are fastest.
        weight: [V, H] of the same type.
        target: integer[M] in [0, ``vocab_size``), or ``ignore_index``.
        rows: int64[M], the hidden state that predicts each target; repeats are welcome (branches share one). By
            default M = N and each row predicts its own.
        temperature: > 0; one for all or floating [M].
        ignore_index: target that gives 0 for every result and no gradient.
        entropy: False spares its arithmetic.
        vocab_size: rows of ``weight`` from there on are padding: they have no mass and get no gradient.
        bias: [V] of the same type; -inf takes a token out of the distribution.
        softcap: c > 0 replaces each logit z by c tanh(z / c).
        kept_ids: int64[M, K], distinct tokens whose total mass is wanted; negative entries are padding.
        grad_dtype: of the gradients handed to autograd, by default those of the inputs. Autograd rounds to the type of
            the input again unless that tensor's ``grad_dtype`` allows another.
        backend: ``"auto"`` takes the Triton form for 16-bit inputs only: wider ones are no faster in it.

    Raises:
        UsageError: shapes, types or devices do not fit, a target is out of range (where they lie on the CPU), or the
            backend cannot run here.
        RuntimeError: on a second derivative.
    """
    name = "fused_linear_logprob"
    vocabulary = _check(name, hidden, weight, target, rows, temperature, ignore_index, vocab_size, bias, softcap)
    if kept_ids is not None and (kept_ids.dim() != 2 or kept_ids.shape[0] != target.shape[0]):
        raise UsageError(f"{name}: kept_ids {tuple(kept_ids.shape)}; expected [{target.shape[0]}, K]")
    form = _form(hidden, weight, target, backend)
    valid, index = _valid(target, ignore_index)
    if index is not None:
        count = target.shape[0]
        target, rows = target[index], index if rows is None else rows[index]
        temperature = temperature[index] if isinstance(temperature, Tensor) else temperature
        kept_ids = None if kept_ids is None else kept_ids[index]
    head = Head(
        target=target if valid is None else target.where(valid, 0),
        inverse=None if _is_one(temperature) else _inverse(temperature, target, hidden.dtype),
        vocabulary=vocabulary,
        softcap=softcap,
        kept_ids=kept_ids,
        entropy=entropy,
        grad_dtype=grad_dtype,
    )
    logprob, entropies, lse, mass = _LinearLogprob.apply(hidden, weight, bias, rows, valid, head, form)
    if index is not None:
        blank = logprob.new_zeros(count)
        logprob, lse = blank.index_copy(0, index, logprob), blank.index_copy(0, index, lse)
        entropies = blank.index_copy(0, index, entropies) if entropies is not None else None
        mass = blank.index_copy(0, index, mass) if mass is not None else None
    return LinearLogprob(logprob, torch.full_like(lse, torch.nan) if entropies is None else entropies, lse, mass)


def fused_linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    token_loss: TokenLoss,
    rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    grad_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (sum of ``token_loss``, logprob[M], entropy[M]), with the gradients formed during the forward pass.

    For losses in which each token stands alone, as in PPO, GRPO and CISPO with token-level ratios. The logits of some
    rows are computed once and turned into their own gradient at once: three products instead of the four of
    ``fused_linear_logprob``, for a chunk of full rows in memory and gradients that live from the forward pass on. Only
    the loss is differentiable, in hidden, weight and bias; the gradient is scaled by that of the loss.

    Args:
        token_loss: called with (logprob[c], entropy[c], index[c]) once per chunk; ``index`` says which targets they
            are, so ``advantage[index]`` belongs to them. Returns the losses [c], weights included. What it closes over
            gets no gradient.
        hidden, weight, target, rows, temperature, ignore_index, vocab_size, bias, softcap, grad_dtype, backend: as in
            ``fused_linear_logprob``.

    Raises:
        UsageError: as there, or ``token_loss`` returns another shape.
    """
    name = "fused_linear_policy_loss"
    vocabulary = _check(name, hidden, weight, target, rows, temperature, ignore_index, vocab_size, bias, softcap)
    form = _form(hidden, weight, target, backend)
    valid, index = _valid(target, ignore_index)
    count = target.shape[0]
    if index is None:
        index = torch.arange(count, device=target.device)
    else:
        target, rows = target[index], index if rows is None else rows[index]
        temperature = temperature[index] if isinstance(temperature, Tensor) else temperature
    head = Head(
        target=target if valid is None else target.where(valid, 0),
        inverse=None,
        vocabulary=vocabulary,
        softcap=softcap,
        kept_ids=None,
        entropy=True,
        grad_dtype=grad_dtype,
    )
    loss, logprob, entropies = _LinearPolicyLoss.apply(
        hidden, weight, bias, rows, valid, index, temperature, head, token_loss, form
    )
    if target.shape[0] != count:
        blank = logprob.new_zeros(count)
        logprob, entropies = blank.index_copy(0, index, logprob), blank.index_copy(0, index, entropies)
    return loss, logprob, entropies


def _check(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    rows: Tensor | None,
    temperature: float | Tensor,
    ignore_index: int,
    vocab_size: int | None,
    bias: Tensor | None,
    softcap: float | None,
) -> int:
    """Return the number of tokens that count; raise ``UsageError`` where something does not fit."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.shape[0] < 1:
        raise UsageError(
            f"{name}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}; expected [N, H] and [V, H], V >= 1"
        )
    others = (weight,) if bias is None else (weight, bias)
    if not hidden.is_floating_point() or any(other.dtype != hidden.dtype for other in others):
        types = ", ".join(str(each.dtype) for each in (hidden, *others))
        raise UsageError(f"{name}: hidden, weight and bias are {types}; expected one floating type, as autocast gives")
    places = target if rows is None else rows
    if target.dim() != 1 or places.shape != target.shape or (rows is None and len(target) != len(hidden)):
        shapes = f"target {tuple(target.shape)}" + ("" if rows is None else f", rows {tuple(rows.shape)}")
        raise UsageError(f"{name}: {shapes} for {len(hidden)} hidden states; expected [M] each, M = N without rows")
    if any(each.is_floating_point() or each.dtype == torch.bool for each in (target, places)):
        raise UsageError(f"{name}: target is {target.dtype} and rows {places.dtype}; expected integers")
    check_temperature(name, temperature, target.shape[0])
    vocabulary = weight.shape[0] if vocab_size is None else vocab_size
    if not 1 <= vocabulary <= weight.shape[0]:
        raise UsageError(f"{name}: vocab_size is {vocab_size}; expected 1 to {weight.shape[0]}, the rows of weight")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UsageError(f"{name}: bias {tuple(bias.shape)}; expected [{weight.shape[0]}]")
    if softcap is not None and not softcap > 0:
        raise UsageError(f"{name}: softcap is {softcap}; expected > 0 or None")
    if target.device.type == "cpu" and len(target):
        _check_range(name, "target", target[target != ignore_index], vocabulary)
        _check_range(name, "rows", places[:0] if rows is None else rows, hidden.shape[0])
    return vocabulary


def _check_range(name: str, what: str, index: Tensor, size: int) -> None:
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise UsageError(f"{name}: {what} has {int(index.min())} to {int(index.max())}; expected 0 to {size - 1}")


def _form(hidden: Tensor, weight: Tensor, target: Tensor, backend: Backend) -> Form:
    form = resolve(backend, hidden, weight, target)
    if form == "triton" and hidden.dtype not in (torch.bfloat16, torch.float16):
        if backend == "triton" and hidden.dtype == torch.float64:
            raise UsageError("the Triton form computes in float32 and takes no float64; use backend 'torch'")
        return "triton" if backend == "triton" else "torch"
    return form


def _valid(target: Tensor, ignore_index: int) -> tuple[Tensor | None, Tensor | None]:
    """Which targets count: a mask where they lie on a device, else their places, to leave out the others' work."""
    valid = target != ignore_index
    if target.device.type != "cpu":
        return valid, None
    return None, None if bool(valid.all()) else valid.nonzero()[:, 0]


def _is_one(temperature: float | Tensor) -> bool:
    return not isinstance(temperature, Tensor) and temperature == 1


def _inverse(temperature: float | Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.float64:
        return inverse_temperature(temperature, target)
    return torch.as_tensor(temperature, dtype=dtype, device=target.device).reciprocal().expand(target.shape)


def _kernels(form: str) -> Any:
    """The module with the two passes."""
    if form == "torch":
        return head_tiles
    from ._triton import linear_logprob

    return linear_logprob


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        valid: Tensor | None,
        head: Head,
        form: str,
    ) -> tuple[Tensor | None, ...]:
        with torch.cuda.device_of(hidden):
            found = _kernels(form).forward(hidden if rows is None else hidden[rows], weight, bias, head)
        ctx.save_for_backward(hidden, weight, bias, rows, valid, *found[1:])
        ctx.head, ctx.form = head, form
        ctx.set_materialize_grads(False)
        if valid is not None:
            found = tuple(None if each is None else each.where(valid, 0) for each in found)
        ctx.mark_non_differentiable(found[2])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, rows, valid, entropy, lse, mass = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        g_logprob, g_entropy, _, g_mass = grads
        if valid is not None:
            g_logprob, g_entropy, g_mass = (
                None if each is None else each.where(valid, 0) for each in (g_logprob, g_entropy, g_mass)
            )
        if g_logprob is None and g_entropy is None and g_mass is None:
            return (None,) * 7
        row_grads = head_tiles.RowGrads(g_logprob, g_entropy, g_mass, lse, entropy, mass)
        x = hidden if rows is None else hidden[rows]
        with torch.cuda.device_of(hidden):
            made = _kernels(ctx.form).backward(x, weight, bias, ctx.head, row_grads, needs)
        return (*_cast(made, hidden, weight, bias, rows, ctx.head.grad_dtype), None, None, None, None)


def _cast(
    made: tuple[Tensor | None, Tensor | None, Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Add up what repeated rows were given, and round each gradient once."""
    grad_hidden, grad_weight, grad_bias = made
    if grad_hidden is not None:
        if rows is not None:
            # With accumulate, index_put sorts the places on the GPU and so adds in the same order every time.
            total = grad_hidden.new_zeros(hidden.shape)
            grad_hidden = total.index_put_((rows.long(),), grad_hidden, accumulate=True)
        grad_hidden = grad_hidden.to(dtype or hidden.dtype)
    if grad_weight is not None:
        grad_weight = grad_weight.to(dtype or weight.dtype)
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.to(dtype or bias.dtype)
    return grad_hidden, grad_weight, grad_bias


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        valid: Tensor | None,
        index: Tensor,
        temperature: float | Tensor,
        head: Head,
        token_loss: TokenLoss,
        form: Form,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden if rows is None else hidden[rows]
        needs = ctx.needs_input_grad[:3]
        gradients = head_tiles.Gradients.zeros(x, weight, bias, needs)
        logprob = x.new_empty(len(x), dtype=gradients.dtype)
        entropy, loss = torch.empty_like(logprob), logprob.new_zeros(())
        size = max(1, _CHUNK_ELEMENTS["cpu" if hidden.device.type == "cpu" else "cuda"] // head.vocabulary)
        for start in range(0, len(x), size):
            chunk = slice(start, min(start + size, len(x)))
            z = head_tiles.full_logits(x[chunk], weight, bias, head)
            own = temperature[chunk] if isinstance(temperature, Tensor) else temperature
            statistics = row_statistics(z, head.target[chunk], own, form)
            logprob[chunk], entropy[chunk] = statistics.logprob, statistics.entropy
            with torch.enable_grad():
                inputs = [statistics.logprob.detach().requires_grad_(), statistics.entropy.detach().requires_grad_()]
                losses = token_loss(inputs[0], inputs[1], index[chunk])
                if losses.shape != inputs[0].shape:
                    raise UsageError(
                        f"fused_linear_policy_loss: token_loss gave {tuple(losses.shape)}; expected one loss per "
                        f"token, {tuple(inputs[0].shape)}"
                    )
                if valid is not None:
                    losses = losses.where(valid[chunk], 0)
                loss += losses.detach().sum()
                grads: Any = (None, None)
                if any(needs) and losses.requires_grad:
                    grads = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
            if all(each is None for each in grads):
                continue
            if valid is not None:
                grads = tuple(None if each is None else each.where(valid[chunk], 0) for each in grads)
            slope = None if head.softcap is None else 1 - (z / head.softcap).square_()
            row_gradient(z, head.target[chunk], own, statistics, grads[0], grads[1], z, form)
            gradients.add(chunk, z if slope is None else z.mul_(slope), x[chunk], weight)
        if valid is not None:
            logprob, entropy = logprob.where(valid, 0), entropy.where(valid, 0)
        made = _cast(gradients.result(), hidden, weight, bias, rows, head.grad_dtype)
        ctx.save_for_backward(*made)
        ctx.mark_non_differentiable(logprob, entropy)
        return loss, logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        made = (None if each is None else each * grad.to(each.dtype) for each in ctx.saved_tensors)
        return (*made, None, None, None, None, None, None, None)
