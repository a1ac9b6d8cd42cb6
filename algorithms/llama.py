"""The body of a Llama-type model over a packed tree, for updates on a CPU.

- ``supports``, ``hidden_states``: what ``model.model`` of transformers computes, with gradients, in fewer passes over
  memory: fused projections, norms folded into them, rotary pairs side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..agents.engines.llama import LlamaRunner
from ..kernels.blocks import norm_linear, rotate, swiglu
from ..kernels.linear import linear
from ..kernels.tree_attention import tree_attention
from ..kernels.trees import TreePack


def supports(model: nn.Module) -> bool:
    """Whether ``model`` is of an architecture, on a device and of a type that gain."""
    parameter = next(model.parameters())
    fits = parameter.device.type == "cpu" and parameter.dtype in (torch.float32, torch.float64)
    return fits and not torch.is_autocast_enabled("cpu") and LlamaRunner.supports(model)


def hidden_states(model: nn.Module, pack: TreePack) -> Tensor:
    """``[T, H]``: the last hidden states, after the final norm, of the packed tokens; differentiable once."""
    body: Any = model.model
    config = body.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    eps = config.rms_norm_eps
    pairs = torch.arange(size).view(2, -1).T.flatten()
    x = nn.functional.embedding(pack.tokens, body.embed_tokens.weight, body.embed_tokens.padding_idx)
    cos, sin = body.rotary_emb(x[None], pack.positions[None])
    rotation = torch.complex(cos[0, :, : size // 2], sin[0, :, : size // 2])
    for block in body.layers:
        attention, mlp = block.self_attn, block.mlp
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight = torch.cat([_paired(parts[0].weight, pairs), _paired(parts[1].weight, pairs), parts[2].weight])
        bias = None
        if parts[0].bias is not None:
            bias = torch.cat([_paired(parts[0].bias, pairs), _paired(parts[1].bias, pairs), parts[2].bias])
        qkv = norm_linear(x, block.input_layernorm.weight, weight, bias, eps).unflatten(1, (-1, size))
        turned, v = qkv[:, : heads + groups], qkv[:, heads + groups :]
        if getattr(attention, "q_norm", None) is not None:
            q, k = turned.split((heads, groups), 1)
            normed = [
                nn.functional.rms_norm(each, (size,), module.weight[pairs], eps)
                for each, module in ((q, attention.q_norm), (k, attention.k_norm))
            ]
            turned = torch.cat(normed, 1)
        q, k = rotate(turned, rotation).split((heads, groups), 1)
        mixed, _ = tree_attention(q, k, v, pack.plan, scale=attention.scaling)
        x = x + linear(mixed.flatten(1), attention.o_proj.weight, attention.o_proj.bias)
        weight = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        bias = None if mlp.gate_proj.bias is None else torch.cat([mlp.gate_proj.bias, mlp.up_proj.bias])
        inner = swiglu(norm_linear(x, block.post_attention_layernorm.weight, weight, bias, eps))
        x = x + linear(inner, mlp.down_proj.weight, mlp.down_proj.bias)
    return nn.functional.rms_norm(x, x.shape[-1:], body.norm.weight, eps)


def _paired(tensor: Tensor, pairs: Tensor) -> Tensor:
    """Rows of each head such that the two halves of a rotary pair are neighbours."""
    return tensor.unflatten(0, (-1, len(pairs)))[:, pairs].flatten(0, 1)
