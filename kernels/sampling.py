"""Sampling from logits with given uniform numbers, and the statistics of each draw.

- ``Sample``: the drawn tokens and their statistics.
- ``sample``: temperature, top-k and top-p sampling by inverse distribution function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError


class Sample(NamedTuple):
    """Drawn tokens; every vector has one entry per row, log-probabilities and entropies in nats.

    *raw* is softmax(logits), *tempered* softmax(logits / temperature), both over the full vocabulary;
    *processed* is the tempered distribution renormalised over the kept tokens, the one that is drawn from.
    """

    token: Tensor
    logprob_raw: Tensor
    logprob_tempered: Tensor
    logprob_processed: Tensor
    entropy_raw: Tensor
    entropy_tempered: Tensor
    entropy_processed: Tensor
    kept_logmass: Tensor
    """log of the tempered mass of the kept tokens, <= 0: logprob_tempered = logprob_processed + kept_logmass."""


def sample(
    logits: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Sample:
    """Draw one token per row; a row's draw depends on no other row.

    The token is the first whose cumulative probability, in vocabulary order and float64, exceeds the uniform.
    Top-k keeps ties with the k-th token; top-p then keeps the smallest set of most probable tokens that
    reaches the mass (Holtzman et al. 2020), always at least one.

    Args:
        logits: [B, V]; -inf marks tokens that cannot be drawn.
        uniforms: float64[B] in [0, 1).
        temperature: > 0, or 0 for the most probable token, with the statistics of temperature 1.
        top_k: tokens to keep; 0 keeps all.
        top_p: mass to keep; 1 keeps all.

    Raises:
        UsageError: shapes do not fit.
    """
    if logits.dim() != 2 or uniforms.shape != logits.shape[:1]:
        raise UsageError(
            f"sample: logits {tuple(logits.shape)} and uniforms {tuple(uniforms.shape)}; expected [B, V] and [B]"
        )
    raw = torch.log_softmax(_statistics_dtype(logits), dim=-1)
    raw_entropy = _entropy(raw)
    if temperature in (0, 1):
        tempered, tempered_entropy = raw, raw_entropy
    else:
        tempered = torch.log_softmax(raw / temperature, dim=-1)
        tempered_entropy = _entropy(tempered)

    if temperature == 0:
        token = tempered.argmax(dim=-1, keepdim=True)
        logprob = tempered.gather(1, token)[:, 0]
        zero = torch.zeros_like(logprob)
        return Sample(token[:, 0], logprob, logprob, zero, raw_entropy, tempered_entropy, zero, logprob)

    keep = _kept(tempered, top_k, top_p)
    kept = tempered if keep is None else tempered.masked_fill(~keep, -torch.inf)
    cumulative = kept.exp().double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniforms.to(cumulative)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[1] - 1)
    logprob_raw = raw.gather(1, token)[:, 0]
    logprob = logprob_raw if tempered is raw else tempered.gather(1, token)[:, 0]
    if keep is None:
        processed, processed_entropy, mass = logprob, tempered_entropy, torch.zeros_like(logprob)
    else:
        mass = total[:, 0].log().to(logprob.dtype)
        processed = logprob - mass
        processed_entropy = _entropy(kept - mass[:, None])
    token = token[:, 0]
    return Sample(token, logprob_raw, logprob, processed, raw_entropy, tempered_entropy, processed_entropy, mass)


def _statistics_dtype(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _entropy(logprobs: Tensor) -> Tensor:
    """Entropy of normalised log-probabilities [B, V]; impossible tokens (-inf) add nothing."""
    return -(logprobs.exp() * logprobs.clamp_min(-1e4)).sum(dim=-1)


def _kept(logprobs: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """Which tokens survive top-k and then top-p, bool[B, V]; ``None`` when all do."""
    keep = None
    if 0 < top_k < logprobs.shape[1]:
        keep = logprobs >= logprobs.topk(top_k, dim=-1).values[:, -1:]
        logprobs = logprobs.masked_fill(~keep, -torch.inf)
    if top_p < 1:
        ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
        mass = ordered.double().exp().cumsum(dim=-1)
        before = torch.nn.functional.pad(mass[:, :-1], (1, 0))
        inside = before < top_p * mass[:, -1:]
        inside &= ordered > -torch.inf
        keep = torch.zeros_like(inside).scatter_(1, order, inside)
    return keep
