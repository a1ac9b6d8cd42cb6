"""One forward pass of a language model, reduced to what a loss needs.

- ``token_statistics``: log-probability and entropy of trained tokens.
- ``predictors``: the positions that trained tokens are predicted from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.logprob import logprob_entropy


def token_statistics(
    model: nn.Module, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy ``[B, L]`` of the tokens in ``mask``, in fp32 nats, 0 elsewhere;
    differentiable.

    Rows are right-padded, so a causal model needs no attention mask: no trained token can see the padding,
    and without a mask the attention kernel takes its faster causal path. The head sees only the positions
    that predict a trained token, by a hook on it, so whatever a model does to its logits afterwards still
    happens.

    Raises:
        UsageError: the first token of a row is marked as trained, which nothing predicts.
    """
    wanted = predictors(mask)
    target = tokens[:, 1:].flatten()[wanted]

    def gather(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, wanted)[None], *inputs[1:])

    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(gather)
    try:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0]
    finally:
        hook.remove()
    blank = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    logprobs, entropy = logprob_entropy(logits, target, temperature=temperature)
    return blank.masked_scatter(mask, logprobs.float()), blank.masked_scatter(mask, entropy.float())


def predictors(mask: Tensor) -> Tensor:
    """``[N]`` indices into the flattened ``tokens[:, :-1]``: for each token of ``mask`` ``[B, L]``, the one before it.

    Raises:
        UsageError: the first token of a row is in ``mask``.
    """
    if mask[:, 0].any():
        raise UsageError("mask[:, 0] is set, but nothing comes before the first token to predict it from")
    return mask[:, 1:].flatten().nonzero()[:, 0]
