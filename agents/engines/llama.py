"""The forward pass of Llama-type models over slots of cached keys and values.

- ``LlamaRunner``: ragged prefill and decode for Llama, Qwen2 and Qwen3 models of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .arena import KVArena, LayerShape

_MODELS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_CALL_COST_CPU = 2000
"""What one more attention call costs, in query-key pairs: about 20 microseconds on one core."""
_CALL_COST_GPU = 1 << 22


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


class _Run(NamedTuple):
    """Rows in neighbouring slots that one attention call serves.

    Queries are tokens ``first`` to ``last`` of the packed batch, ``width`` per row after padding.
    """

    first: int
    last: int
    rows: int
    slot: int
    width: int
    length: int
    pad: Tensor | None
    """Where the run's tokens stand among rows x width; ``None`` when no row is padded."""
    mask: Tensor | None


class LlamaRunner:
    """Runs the module's weights with fused projections; keys are written into the arena in place.

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
        self._inner = config.intermediate_size
        self._eps = config.rms_norm_eps
        shape = LayerShape(self._key_heads, self._size, self._size)
        self.layers: Sequence[LayerShape] = [shape] * config.num_hidden_layers
        self._blocks: list[_Layer] = []
        self._rotation = torch.empty(0)

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
                    out=attention.o_proj.weight.detach().t(),
                    out_bias=attention.o_proj.bias,
                    gate_up=gate_up * block.post_attention_layernorm.weight,
                    gate_up_bias=joined(mlp.gate_proj.bias, mlp.up_proj.bias),
                    down=mlp.down_proj.weight.detach().t(),
                    down_bias=mlp.down_proj.bias,
                )
            )

    def forward(
        self,
        arena: KVArena,
        slots: NDArray[np.int64],
        starts: NDArray[np.int64],
        tokens: Sequence[NDArray[np.integer[Any]]],
    ) -> Tensor:
        """Append ``tokens[i]`` to slot ``slots[i]`` at position ``starts[i]``; return logits of each last token.

        Args:
            arena: holds the keys and values of positions below ``starts``; receives those of the new tokens.
            slots: int64[n], strictly ascending.
            starts: int64[n].
            tokens: n vectors of at least one token each.

        Returns:
            [n, V] in the model's type.
        """
        weight = self._model.model.embed_tokens.weight
        device = weight.device
        counts = np.array([len(row) for row in tokens], dtype=np.int64)
        ends = counts.cumsum()
        rows = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)
        heads = np.arange(self._key_heads)
        write = (slots[rows, None] * self._key_heads + heads) * arena.capacity + positions[:, None]
        written = torch.from_numpy(write.ravel()).to(device)
        rotation = self._rotations(arena.capacity, device)[torch.from_numpy(positions).to(device)][:, None]
        runs = self._runs(slots, starts, counts, device, weight.dtype)
        last = torch.from_numpy(ends - 1).to(device)
        last_runs = runs
        if ends[-1] > len(counts):
            last_runs = self._runs(slots, starts + counts - 1, np.ones_like(counts), device, weight.dtype)

        packed = torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(device)
        x = F.embedding(packed, weight)
        for number, block in enumerate(self._blocks):
            query = self._project(block, x, rotation, written, arena.keys[number], arena.values[number])
            used = runs
            if number + 1 == len(self._blocks) and last_runs is not runs:
                x, query, used = x[last], query[last], last_runs
            mixed = self._attend(query, used, arena.keys[number], arena.values[number])
            x = torch.addmm(x, mixed, block.out)
            if block.out_bias is not None:
                x = x + block.out_bias
            inner = F.linear(F.rms_norm(x, x.shape[-1:], None, self._eps), block.gate_up, block.gate_up_bias)
            x = torch.addmm(x, F.silu(inner[:, : self._inner]).mul_(inner[:, self._inner :]), block.down)
            if block.down_bias is not None:
                x = x + block.down_bias
        return self._model.lm_head(F.rms_norm(x, x.shape[-1:], self._model.model.norm.weight, self._eps))

    def _rotations(self, capacity: int, device: torch.device) -> Tensor:
        """exp(i position x frequency) as the model's own rotary module gives it, complex64[positions, D / 2]."""
        if len(self._rotation) < capacity or self._rotation.device != device:
            positions = torch.arange(capacity, device=device)[None]
            cos, sin = self._model.model.rotary_emb(torch.zeros(1, device=device), positions)
            half = self._size // 2
            self._rotation = torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())
        return self._rotation

    def _project(
        self, block: _Layer, x: Tensor, rotation: Tensor, written: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Write keys and values of x [T, H] into the arena; return the rotated queries [T, heads, D]."""
        normed = F.rms_norm(x, x.shape[-1:], None, self._eps)
        both = self._query_heads + self._key_heads
        qkv = F.linear(normed, block.qkv, block.qkv_bias).unflatten(1, (both + self._key_heads, self._size))
        qk = qkv[:, :both]
        if block.q_norm is not None and block.k_norm is not None:
            q = F.rms_norm(qk[:, : self._query_heads], (self._size,), block.q_norm, self._eps)
            k = F.rms_norm(qk[:, self._query_heads :], (self._size,), block.k_norm, self._eps)
            qk = torch.cat((q, k), dim=1)
        turned = torch.view_as_complex(qk.float().unflatten(-1, (-1, 2))) * rotation
        qk = torch.view_as_real(turned).flatten(-2).to(x.dtype)
        keys.view(-1, self._size).index_copy_(0, written, qk[:, self._query_heads :].reshape(-1, self._size))
        values.view(-1, self._size).index_copy_(0, written, qkv[:, both:].reshape(-1, self._size))
        return qk[:, : self._query_heads]

    def _attend(self, query: Tensor, runs: Sequence[_Run], keys: Tensor, values: Tensor) -> Tensor:
        """Attention of query [T, heads, D] over the slots' keys; returns [T, heads x D]."""
        width = self._query_heads * self._size
        out = query.new_empty(len(query), width)
        for run in runs:
            k = keys[run.slot : run.slot + run.rows, :, : run.length]
            v = values[run.slot : run.slot + run.rows, :, : run.length]
            q = query[run.first : run.last]
            if run.width == 1:
                # The query heads of one key head stand as its query positions: keys are read once.
                q = q.reshape(run.rows, self._key_heads, -1, self._size)
                mask = None if run.mask is None else run.mask.expand(-1, -1, q.shape[2], -1)
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                out[run.first : run.last] = mixed.reshape(run.rows, width)
                continue
            if run.pad is not None:
                padded = q.new_zeros(run.rows * run.width, self._query_heads, self._size)
                q = padded.index_copy_(0, run.pad, q)
            q = q.reshape(run.rows, run.width, self._query_heads, self._size).transpose(1, 2)
            grouped = self._query_heads != self._key_heads
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=run.mask, enable_gqa=grouped)
            mixed = mixed.transpose(1, 2).reshape(run.rows * run.width, width)
            out[run.first : run.last] = mixed if run.pad is None else mixed[run.pad]
        return out

    def _runs(
        self,
        slots: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        device: torch.device,
        dtype: torch.dtype,
    ) -> list[_Run]:
        """Split the rows into attention calls: a row joins its neighbour's call unless padding costs more."""
        call_cost = _CALL_COST_CPU if device.type == "cpu" else _CALL_COST_GPU
        lengths = starts + counts
        firsts = [0]
        width = length = area = 0
        for row, (count, reach) in enumerate(zip(counts.tolist(), lengths.tolist(), strict=True)):
            wide, long = max(width, count), max(length, reach)
            joined = (row - firsts[-1] + 1) * wide * long
            adjacent = row > 0 and slots[row] == slots[row - 1] + 1
            if row > firsts[-1] and not (adjacent and joined - area - count * reach <= call_cost):
                firsts.append(row)
                wide, long, joined = count, reach, count * reach
            width, length, area = wide, long, joined
        ends = counts.cumsum()
        runs = []
        for first, last in zip(firsts, [*firsts[1:], len(counts)], strict=True):
            width, length = int(counts[first:last].max()), int(lengths[first:last].max())
            positions = starts[first:last, None] + np.arange(width)
            pad = mask = None
            if (counts[first:last] != width).any():
                inside = np.arange(width) < counts[first:last, None]
                pad = torch.from_numpy(np.flatnonzero(inside)).to(device)
            if width > 1 or (lengths[first:last] != length).any():
                hidden = np.arange(length) > positions[:, None, :, None]
                mask = torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)))
                mask = mask.to(device=device, dtype=dtype)
            start = int(ends[first] - counts[first])
            runs.append(_Run(start, int(ends[last - 1]), last - first, int(slots[first]), width, length, pad, mask))
        return runs
