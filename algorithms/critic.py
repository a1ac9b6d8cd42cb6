"""The critic: what a state is worth.

- ``Critic``: a copy of a language model's body with a scalar head.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels.trees import TreePack
from .forward import last_hidden, predictors


class Critic(nn.Module):
    """Its own copy of the transformer under a causal language model, and a linear head that starts at 0.

    So it begins with what the policy knows of language, and with the value 0 everywhere. What is frozen in the policy
    is frozen here.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Raises:
            UsageError: ``model`` is not a causal language model of ``transformers``.
        """
        super().__init__()
        body = getattr(model, "base_model", model)
        output = getattr(model, "get_output_embeddings", lambda: None)()
        if body is model or output is None:
            raise UsageError(
                f"a critic is made from a causal language model of transformers, not from {type(model).__name__}; "
                "expected one with a base_model and output embeddings"
            )
        self.body = copy.deepcopy(body)
        width, device = output.weight.shape[1], output.weight.device
        # Not initialised by torch, whose random numbers would be those of the caller.
        self.head = nn.utils.skip_init(nn.Linear, width, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def values(self, tokens: Tensor, mask: Tensor, pack: TreePack | None = None) -> Tensor:
        """``[B, L]`` float32: the value of the state before each token of ``mask``, 0 elsewhere; differentiable.

        The state before token ``t`` is what the body makes of tokens 0 to ``t-1``; the head is applied there only. Rows
        are right-padded, so no attention mask is needed, or stand in ``pack``; see ``token_statistics``.

        Raises:
            UsageError: the first token of a row is in ``mask``; nothing comes before it.
        """
        wanted = predictors(mask, pack)
        state = last_hidden(self.body, tokens, pack).index_select(0, wanted)
        with torch.autocast(state.device.type, enabled=False):
            values = self.head(state.float())[:, 0]
        return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter(mask, values)
