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
    Entropies are exact, or the estimates of ``sample``'s ``entropy_top_k``.
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
    entropy_top_k: int = 0,
) -> Sample:
    """Draw one token per row; a row's draw depends on no other row.

    The token is the first whose cumulative probability, in vocabulary order and float64, exceeds the uniform.
    Top-k keeps ties with the k-th token; top-p then keeps the smallest set of most probable tokens that
    reaches the mass (Holtzman et al. 2020), always at least one.

    Servers such as vLLM give the log-probabilities of the k most probable tokens and of the drawn one. What such
    data say of the entropy is a lower estimate: −Σ p log p over them, not renormalised.

    Args:
        logits: [B, V]; -inf marks tokens that cannot be drawn.
        uniforms: float64[B] in [0, 1).
        temperature: > 0, or 0 for the most probable token, with the statistics of temperature 1.
        top_k: tokens to keep; 0 keeps all.
        top_p: mass to keep; 1 keeps all.
        entropy_top_k: 0 for exact entropies, else that estimate from k tokens, and the drawn one where it is less
            probable than all of them; exact where k covers the vocabulary.

    Raises:
        UsageError: shapes do not fit.
    """
    if logits.dim() != 2 or uniforms.shape != logits.shape[:1]:
        raise UsageError(
            f"sample: logits {tuple(logits.shape)} and uniforms {tuple(uniforms.shape)}; expected [B, V] and [B]"
        )
    raw = torch.log_softmax(_statistics_dtype(logits), dim=-1)
    tempered = raw if temperature in (0, 1) else torch.log_softmax(raw / temperature, dim=-1)

    if temperature == 0:
        token = tempered.argmax(dim=-1, keepdim=True)
        logprob = tempered.gather(1, token)[:, 0]
        entropy = _entropy(raw, entropy_top_k, logprob)
        zero = torch.zeros_like(logprob)
        return Sample(token[:, 0], logprob, logprob, zero, entropy, entropy, zero, logprob)

    keep = _kept(tempered, top_k, top_p)
    kept = tempered if keep is None else tempered.masked_fill(~keep, -torch.inf)
    cumulative = kept.exp().double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniforms.to(cumulative)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[1] - 1)
    logprob_raw = raw.gather(1, token)[:, 0]
    logprob = logprob_raw if tempered is raw else tempered.gather(1, token)[:, 0]
    raw_entropy = _entropy(raw, entropy_top_k, logprob_raw)
    tempered_entropy = raw_entropy if tempered is raw else _entropy(tempered, entropy_top_k, logprob)
    if keep is None:
        processed, processed_entropy, mass = logprob, tempered_entropy, torch.zeros_like(logprob)
    else:
        mass = total[:, 0].log().to(logprob.dtype)
        processed = logprob - mass
        processed_entropy = _entropy(kept - mass[:, None], entropy_top_k, processed)
    token = token[:, 0]
    return Sample(token, logprob_raw, logprob, processed, raw_entropy, tempered_entropy, processed_entropy, mass)


def _statistics_dtype(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _entropy(logprobs: Tensor, top_k: int, drawn: Tensor) -> Tensor:
    """Entropy of normalised log-probabilities [B, V], or its estimate from ``top_k`` of them and ``drawn`` [B]."""
    if not 0 < top_k < logprobs.shape[1]:
        return -_terms(logprobs).sum(dim=-1)
    known = logprobs.topk(top_k, dim=-1).values
    # Of equally probable tokens it is arbitrary which are among the k; one that ties with the last counts as known.
    return -(_terms(known).sum(dim=-1) + torch.where(drawn < known[:, -1], _terms(drawn), 0.0))


def _terms(logprobs: Tensor) -> Tensor:
    """p log p; impossible tokens (-inf) add nothing."""
    return logprobs.exp() * logprobs.clamp_min(-1e4)


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
