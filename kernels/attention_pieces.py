"""Pieces of attention: one block of queries over one block of keys, and long causal rows made of such blocks.

- ``piece``, ``piece_backward``: full or causal attention of one block, on the CPU's flash attention where it fits.
- ``causal``, ``causal_backward``: causal attention of rows, without the products that the mask would throw away.
- ``join``: attention over some keys joined with attention over others, by their log-sum-exp.

A piece's gradient with the joined output and log-sum-exp is its exact share of the whole gradient, since
dS = P * (dP - sum(dO * O)) holds entry by entry with the probabilities of the whole row (Dao 2023, section 3).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .trees import halvings


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Return float64 for float64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def causal(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of q, k, v [n, m, H, D]; out and log-sum-exp [n, m, H] are fp32, or float64 for float64.

    The CPU's causal kernel computes whole blocks of 512 keys. Halving each row down to short causal blocks and
    joining the full squares that remain halves the products of rows up to 512.
    """
    n, m = q.shape[:2]
    parts = halvings(m) if m % (1 << halvings(m)) == 0 else 0
    q, k, v = (x.contiguous() if parts else x for x in (q, k, v))
    blocks = n << parts
    out, lse = piece(*(x.reshape(blocks, -1, *x.shape[2:]) for x in (q, k, v)), causal=True, scale=scale)
    out, lse = out.contiguous().to(statistics_dtype(q)), lse.contiguous()
    for level in range(parts):
        qs, ks, vs, outs, lses = (_halves(x, n << level) for x in (q, k, v, out, lse))
        join(outs[:, 1], lses[:, 1], *piece(qs[:, 1], ks[:, 0], vs[:, 0], causal=False, scale=scale))
    return out.view(n, m, *out.shape[2:]), lse.view(n, m, -1)


def causal_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Gradients of ``causal`` with respect to q, k, v."""
    n, m = q.shape[:2]
    parts = halvings(m) if m % (1 << halvings(m)) == 0 else 0
    inputs = tuple(x.contiguous() for x in (grad, q, k, v, out, lse)) if parts else (grad, q, k, v, out, lse)
    blocks = n << parts
    gradients = piece_backward(*(x.reshape(blocks, -1, *x.shape[2:]) for x in inputs), causal=True, scale=scale)
    totals = tuple(x.contiguous().to(dtype) for x in gradients)
    for level in range(parts):
        grads, qs, ks, vs, outs, lses = (_halves(x, n << level) for x in inputs)
        dq, dk, dv = (_halves(x, n << level) for x in totals)
        share = piece_backward(
            grads[:, 1], qs[:, 1], ks[:, 0], vs[:, 0], outs[:, 1], lses[:, 1], causal=False, scale=scale
        )
        dq[:, 1] += share[0]
        dk[:, 0] += share[1]
        dv[:, 0] += share[2]
    return tuple(x.view(n, m, *x.shape[2:]) for x in totals)


def _halves(x: Tensor, rows: int) -> Tensor:
    """A contiguous [.., .., H, ...] as [rows, 2, half a row, H, ...]."""
    return x.view(rows, 2, -1, *x.shape[2:])


def join(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Join attention over other keys to out [.., H, D] and lse [.., H], in place."""
    weight = torch.sigmoid(more_lse - lse)
    out.lerp_(more.to(out.dtype), weight[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


@functools.cache
def _flash() -> tuple[Any, Any] | None:
    """The CPU's flash attention, forward and backward."""
    forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    return (forward.default, backward.default) if forward and backward else None


@functools.cache
def _grouped() -> bool:
    """Whether the CPU's flash attention reads grouped key heads; earlier versions read beyond their end."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 13)


def _fits_flash(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and q.dtype != torch.float16 and _flash() is not None


def piece(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of q [n, a, Hq, D] to all, or causally to the same number of, keys [n, b, Hk, D].

    Returns out [n, a, Hq, Dv] and the log-sum-exp [n, a, Hq] in fp32, or float64 for float64.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if _fits_flash(q, v):
        forward, _ = _flash()  # type: ignore[misc]
        k, v = _expanded(k, v, q.shape[1], _grouped())
        out, lse = forward(q, k, v, 0.0, causal, scale=scale)
    else:
        k, v = _expanded(k, v, q.shape[1], False)
        scores = _scores(q, k, causal, scale)
        lse = torch.logsumexp(scores, dim=-1)
        out = (scores - lse[..., None]).exp() @ v.to(scores.dtype)
    return out.transpose(1, 2), lse.transpose(1, 2)


def piece_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, ...]:
    """What this piece adds to the gradients; ``out`` and ``lse`` are those of the whole rows."""
    heads = k.shape[2]
    grad, q, k, v, out, lse = (x.transpose(1, 2) for x in (grad, q, k, v, out, lse))
    if _fits_flash(q, v):
        _, backward = _flash()  # type: ignore[misc]
        k, v = _expanded(k, v, q.shape[1], _grouped())
        dq, dk, dv = backward(grad, q, k, v, out, lse, 0.0, causal, scale=scale)
    else:
        k, v = _expanded(k, v, q.shape[1], False)
        p = (_scores(q, k, causal, scale) - lse[..., None]).exp()
        grad = grad.to(p.dtype)
        dp = grad @ v.to(p.dtype).transpose(2, 3)
        ds = p * (dp - (grad * out).sum(dim=-1, keepdim=True)) * scale
        dq, dk, dv = ds @ k.to(p.dtype), ds.transpose(2, 3) @ q.to(p.dtype), p.transpose(2, 3) @ grad
    if dk.shape[1] != heads:
        dk, dv = (x.unflatten(1, (heads, -1)).sum(dim=2) for x in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _expanded(k: Tensor, v: Tensor, heads: int, grouped: bool) -> tuple[Tensor, Tensor]:
    """Keys and values once per query head, unless the kernel groups them itself."""
    groups = heads // k.shape[1]
    if grouped or groups == 1:
        return k, v
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    dtype = statistics_dtype(q)
    scores = q.to(dtype) @ k.to(dtype).transpose(2, 3) * scale
    if causal:
        hidden = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores
