"""One forward pass of a language model, reduced to what a loss needs.

- ``token_statistics``: log-probability and entropy of trained tokens.
- ``last_hidden``: the last hidden states of a model's body.
- ``predictors``: the positions that trained tokens are predicted from.

Both kinds of input are served: rows padded to one width, and rows packed into a tree in which a prefix that several
of them share stands once (``TreePack``). What comes out is the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.linear import linear
from ..kernels.linear_logprob import fused_linear_logprob
from ..kernels.logprob import logprob_entropy
from ..kernels.tree_attention import use_tree_attention
from ..kernels.trees import TreePack
from . import llama

_MATERIALISED = 1 << 24
"""Logits of one pass that are computed once and kept, 64 MB in fp32; for more, the head computes them twice, in tiles
(a quarter more arithmetic in the head for a memory that no longer grows)."""


def token_statistics(
    model: nn.Module, tokens: Tensor, mask: Tensor, *, temperature: float = 1.0, pack: TreePack | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy ``[B, L]`` of the tokens in ``mask``, in nats, 0 elsewhere; differentiable. In fp32,
    for a float64 model in float64.

    Padded rows are padded on the right, so a causal model needs no attention mask: no trained token can see the
    padding, and without a mask the attention kernel takes its faster causal path. The head sees only the positions
    that predict a trained token; where rows of a pack share a prediction, it is made once, and its gradient is the sum
    of theirs.

    Args:
        model: a causal language model.
        tokens: int64[B, L].
        mask: bool[B, L].
        temperature: logits are divided by it.
        pack: the rows' tokens up to the one before the last trained token, packed; None for padded rows.

    Raises:
        UsageError: the first token of a row is marked as trained, which nothing predicts.
    """
    wanted, target = predictors(mask, pack), tokens[mask]
    shared: Tensor | None = None
    head = model.get_output_embeddings()  # type: ignore[operator]
    vocabulary = head.weight.shape[0]
    if pack is not None:
        # Not by the vocabulary: a token beyond it would pass for one of the next position.
        pairs, shared = torch.unique((wanted << 32) + target, return_inverse=True)
        wanted, target = pairs >> 32, pairs & (1 << 32) - 1
    large = len(target) * vocabulary > _MATERIALISED
    hidden: Tensor | None = None
    if pack is not None and llama.supports(model):
        hidden = llama.hidden_states(model, pack)
    elif large and _plain_head(model):
        whole: Any = model
        hidden = last_hidden(whole.base_model, tokens, pack)
    if hidden is not None:
        hidden, weight, bias = _cast(hidden, head.weight, head.bias)
        if large:
            found = fused_linear_logprob(hidden, weight, target, rows=wanted, bias=bias, temperature=temperature)
            logprobs, entropy = found.logprob, found.entropy
        else:
            logits = linear(hidden.index_select(0, wanted), weight, bias)
            logprobs, entropy = logprob_entropy(logits, target, temperature=temperature)[:2]
    else:
        logits = _logits(model, tokens, wanted, pack)
        logprobs, entropy = logprob_entropy(logits, target, temperature=temperature)[:2]
    if shared is not None:
        logprobs, entropy = logprobs[shared], entropy[shared]
    blank = torch.zeros(mask.shape, dtype=logprobs.dtype, device=mask.device)
    return blank.masked_scatter(mask, logprobs), blank.masked_scatter(mask, entropy)


def last_hidden(body: nn.Module, tokens: Tensor, pack: TreePack | None) -> Tensor:
    """``[N, H]``: what ``body`` makes of the packed tokens, or of padded rows without their last column."""
    with _reader(body, tokens, pack) as read:
        return read().last_hidden_state.flatten(0, 1)


def predictors(mask: Tensor, pack: TreePack | None = None) -> Tensor:
    """``[N]``: for each token of ``mask`` ``[B, L]`` the place of the one before it, in the pack or in the flattened
    ``tokens[:, :-1]``.

    Raises:
        UsageError: the first token of a row is in ``mask``.
    """
    if mask[:, 0].any():
        raise UsageError("mask[:, 0] is set, but nothing comes before the first token to predict it from")
    rows, columns = mask.nonzero(as_tuple=True)
    return rows * (mask.shape[1] - 1) + columns - 1 if pack is None else pack.place[rows, columns - 1]


@contextmanager
def _reader(module: nn.Module, tokens: Tensor, pack: TreePack | None) -> Iterator[Callable[[], Any]]:
    """How to call ``module`` on the tokens."""
    if pack is None:
        yield lambda: module(input_ids=tokens[:, :-1], use_cache=False)
        return
    with use_tree_attention(module, pack):
        yield lambda: module(input_ids=pack.tokens[None], position_ids=pack.positions[None], use_cache=False)


def _logits(model: nn.Module, tokens: Tensor, wanted: Tensor, pack: TreePack | None) -> Tensor:
    """``[N, V]`` at the positions ``wanted``, by a hook on the head, so that whatever the model does to its logits
    afterwards still happens."""

    def gather(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, wanted)[None], *inputs[1:])

    with _reader(model, tokens, pack) as read:  # which may try the model, so without the hook
        hook = model.get_output_embeddings().register_forward_pre_hook(gather)  # type: ignore[operator]
        try:
            return read().logits[0]
        finally:
            hook.remove()


_plain: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@torch.no_grad()
def _plain_head(model: nn.Module) -> bool:
    """Whether the logits are the output layer applied to the body's last hidden state and nothing else; tried once."""
    if model not in _plain:
        head, body = model.get_output_embeddings(), getattr(model, "base_model", model)  # type: ignore[operator]
        _plain[model] = isinstance(head, nn.Linear) and body is not model and _try_head(model, body, head)
    return _plain[model]


def _try_head(model: nn.Module, body: nn.Module, head: nn.Linear) -> bool:
    made: list[Tensor] = []

    def lift(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        # The logits of new weights are so small that a soft cap would not show.
        made[:] = output, output + 1000
        return made[1]

    ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
    with torch.autocast(head.weight.device.type, enabled=False):
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state
        hook = head.register_forward_hook(lift)
        try:
            logits = model(input_ids=ids, use_cache=False).logits
        finally:
            hook.remove()
        if hidden.shape[-1] != head.weight.shape[1] or not made or logits.shape != made[1].shape:
            return False
        output = nn.functional.linear(hidden, head.weight, head.bias)
    return all(torch.allclose(a, b.to(a), atol=1e-5) for a, b in ((output, made[0]), (logits, made[1])))


def _cast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the type that autocast would give a linear layer."""
    kind = next(tensor for tensor in tensors if tensor is not None).device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(None if tensor is None else tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)
