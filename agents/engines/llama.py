"""The forward pass of Llama-type models over the cache's blocks.

- ``LlamaRunner``: ragged prefill and decode for Llama, Qwen2 and Qwen3 models of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.blocks import add_norm, gated
from ...kernels.linear import linear
from ...kernels.paged import LayerShape, PagedKV, rotate_and_store
from .attention import Attention, plan
from .generic import Array
from .graphs import Decoder

_MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True)
class _Layer:
    """Weights of one block; input norms are multiplied into the projections that follow them."""

    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class LlamaRunner:
    """Runs the module's weights with fused projections; keys are written into the cache in place.

    Tokens of all rows are packed without padding through the linear layers. In a prefill the last block and the
    head see only the last token of each row. Rotary pairs are stored side by side (rows of the query and key
    projections are permuted), which leaves every attention score as it was and makes the rotation one complex
    product.
    """

    def __init__(self, model: nn.Module) -> None:
        """Read the shapes of ``model``; call ``refresh`` before the first ``forward``."""
        config: Any = model.config
        self._model: Any = model
        self._query_heads = config.num_attention_heads
        self._key_heads = config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._eps = config.rms_norm_eps
        shape = LayerShape(self._key_heads, self._size, self._size)
        self.layers: Sequence[LayerShape] = [shape] * config.num_hidden_layers
        self._blocks: list[_Layer] = []
        self._positions = config.max_position_embeddings
        self._rotation = torch.empty(0)
        self._decoder = Decoder(self._compute)

    @staticmethod
    def supports(model: nn.Module) -> bool:
        """Whether ``model`` has the architecture that this runner computes, to the last option."""
        config: Any = getattr(model, "config", None)
        if type(model).__name__ not in _MODELS or config.hidden_act != "silu":
            return False
        rotary = getattr(model.model, "rotary_emb", None)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        rope = getattr(rotary, "rope_type", "default")
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return (
            kinds == {"full_attention"}
            and rope in ("default", "linear", "llama3", "yarn")
            and len(getattr(rotary, "inv_freq", ())) * 2 == size
        )

    @torch.no_grad()
    def refresh(self) -> None:
        """Rebuild the fused weights from the module's present values."""
        half = self._size // 2
        pairs = torch.stack((torch.arange(half), torch.arange(half) + half), dim=1).flatten()

        def paired(tensor: Tensor, heads: int) -> Tensor:
            return tensor.unflatten(0, (heads, self._size))[:, pairs.to(tensor.device)].flatten(0, 1)

        def joined(*biases: Tensor | None) -> Tensor | None:
            present = [bias for bias in biases if bias is not None]
            return torch.cat(present) if present else None

        def norm(module: Any) -> Tensor | None:
            return None if module is None else module.weight.detach()[pairs.to(module.weight.device)]

        self._decoder.forget()
        self._rotation = self._rotations(self._positions, self._model.model.embed_tokens.weight.device)
        self._blocks = []
        for block in self._model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
            q_bias = None if q.bias is None else paired(q.bias, self._query_heads)
            k_bias = None if k.bias is None else paired(k.bias, self._key_heads)
            qkv = torch.cat((paired(q.weight, self._query_heads), paired(k.weight, self._key_heads), v.weight))
            gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
            self._blocks.append(
                _Layer(
                    qkv=qkv * block.input_layernorm.weight,
                    qkv_bias=joined(q_bias, k_bias, v.bias),
                    q_norm=norm(getattr(attention, "q_norm", None)),
                    k_norm=norm(getattr(attention, "k_norm", None)),
                    out=attention.o_proj.weight.detach(),
                    out_bias=attention.o_proj.bias,
                    gate_up=gate_up * block.post_attention_layernorm.weight,
                    gate_up_bias=joined(mlp.gate_proj.bias, mlp.up_proj.bias),
                    down=mlp.down_proj.weight.detach(),
                    down_bias=mlp.down_proj.bias,
                )
            )

    def forget(self) -> None:
        """Let go of the cache: captured steps refer to it."""
        self._decoder.forget()

    def forward(self, kv: PagedKV, sequences: Array, starts: Array, counts: Array, tokens: Array) -> Tensor:
        """Append tokens to sequences that have room for them; return the logits of each sequence's last token.

        Args:
            kv: holds the keys and values of positions below ``starts``; receives those of the new tokens.
            sequences: int64[n].
            starts: int64[n].
            counts: int64[n], at least one new token each.
            tokens: int64[sum of counts].

        Returns:
            [n, V] in the model's type.
        """
        if kv.device.type == "cpu":
            return self._packed(kv, sequences, starts, counts, tokens)
        single, several = np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)
        ends = counts.cumsum()
        logits = []
        if len(single):
            logits.append(self._decoder.run(kv, sequences[single], starts[single], tokens[ends[single] - 1]))
        if len(several):
            rows = sequences[several], starts[several], counts[several]
            logits.append(self._packed(kv, *rows, tokens[np.repeat(counts > 1, counts)]))
        both = torch.cat(logits)
        order = np.argsort(np.concatenate((single, several)))
        return both[torch.from_numpy(order).to(both.device)]

    def _packed(self, kv: PagedKV, sequences: Array, starts: Array, counts: Array, tokens: Array) -> Tensor:
        ends = counts.cumsum()
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        places = kv.addresses(np.repeat(sequences, counts), positions)
        attend = attend_last = plan(kv, sequences, starts, counts)
        last = None
        if ends[-1] > len(counts):
            last = torch.from_numpy(ends - 1).to(kv.device)
            attend_last = plan(kv, sequences, starts + counts - 1, np.ones_like(counts))
        inputs = [tokens, positions, places]
        if kv.device.type == "cpu":
            # oneDNN compiles a product anew for every number of rows, which takes longer than the product.
            blank = len(kv.references) * kv.block
            inputs = [_filled(part, value) for part, value in zip(inputs, (0, 0, blank), strict=True)]
            last = None if last is None else torch.from_numpy(_filled(ends - 1, 0))
        ids, where, written = (torch.from_numpy(part).to(kv.device) for part in inputs)
        return self._compute(kv, ids, where, written, attend, attend_last, last)[: len(counts)]

    def _compute(
        self,
        kv: PagedKV,
        ids: Tensor,
        positions: Tensor,
        places: Tensor,
        attend: Attention,
        attend_last: Attention,
        last: Tensor | None,
    ) -> Tensor:
        """The arithmetic of a pass: int64[T] token ids and positions to the logits of ``last``, of all where None.

        Attention may know of fewer tokens; it returns zeros for those after its own.
        """
        x = F.embedding(ids, self._model.model.embed_tokens.weight)
        normed = F.rms_norm(x, x.shape[-1:], None, self._eps)
        for number, block in enumerate(self._blocks):
            query = self._project(block, normed, positions, places, kv.keys[number], kv.values[number])
            used = attend
            if number + 1 == len(self._blocks) and last is not None:
                x, query, used = x[last], query[last], attend_last
            mixed = used(number, query).to(x.dtype)
            x, normed = add_norm(x, linear(mixed, block.out, block.out_bias), self._eps)
            inner = gated(linear(normed, block.gate_up, block.gate_up_bias))
            x, normed = add_norm(x, linear(inner, block.down, block.down_bias), self._eps)
        head, norm = self._model.lm_head, self._model.model.norm.weight
        return linear(normed * norm, head.weight, head.bias)

    def _rotations(self, positions: int, device: torch.device) -> Tensor:
        """exp(i position x frequency) as the model's own rotary module gives it, complex64[positions, D / 2]."""
        where = torch.arange(positions, device=device)[None]
        cos, sin = self._model.model.rotary_emb(torch.zeros(1, device=device), where)
        half = self._size // 2
        return torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())

    def _project(
        self, block: _Layer, normed: Tensor, positions: Tensor, places: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Write keys and values of normed states [T, H] to the cache; return the rotated queries [T, heads, D]."""
        both = self._query_heads + self._key_heads
        qkv = linear(normed, block.qkv, block.qkv_bias).unflatten(1, (both + self._key_heads, self._size))
        if block.q_norm is not None and block.k_norm is not None:
            q, k, v = qkv.split((self._query_heads, self._key_heads, self._key_heads), dim=1)
            q, k = (F.rms_norm(x, (self._size,), w, self._eps) for x, w in ((q, block.q_norm), (k, block.k_norm)))
            qkv = torch.cat((q, k, v), dim=1)
        return rotate_and_store(qkv, self._query_heads, self._rotation, positions, places, keys, values)


def _filled(values: Array, value: int) -> Array:
    """With more values at the end, up to one of few lengths."""
    count = len(values)
    step = 16 if count <= 512 else 128
    return np.pad(values, (0, -count % step), constant_values=value)
