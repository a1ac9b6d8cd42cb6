"""Attention over packed trees: each query sees the keys on its own path, and each shared key is computed once.

- ``tree_attention``: output and log-sum-exp, differentiable in queries, keys and values.
- ``use_tree_attention``: makes a transformers model read a pack, for the length of a ``with`` block.
- ``supports_tree_attention``: whether a model computes on a pack what it computes on each row alone.

The torch form computes the pieces of a ``TreePlan`` and joins them by their log-sum-exp.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import UsageError
from .attention_pieces import causal, causal_backward, join, piece, piece_backward, statistics_dtype
from .dispatch import Backend, resolve
from .trees import CausalBatch, TreePack, TreePlan, pack_tree, plan_tree

_NAME = "agentropy_tree"
"""Under this name transformers knows the attention."""


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: TreePack | TreePlan | Tensor,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend over a pack: key ``j`` is visible to query ``i`` iff ``j <= i < end[j]``.

    Args:
        q: [T, Hq, D], any floating type.
        k: [T, Hk, D]; Hq is a multiple of Hk, and query head h reads key head h // (Hq / Hk).
        v: [T, Hk, Dv].
        pack: a pack, its plan, or ``end`` int64[T], for which a plan is made anew.
        scale: factor on the products of queries and keys, 1 / sqrt(D) by default.

    Returns:
        out[T, Hq, Dv] in the type of ``q`` and the log-sum-exp [T, Hq] of the scaled products, in fp32 (float64 for
        float64). ``out`` is differentiable once; the log-sum-exp is not.

    Raises:
        UsageError: shapes or types do not fit, or the backend cannot run here.
    """
    end = pack if isinstance(pack, Tensor) else pack.end
    _check(q, k, v, end)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    form = resolve(backend, q, k, v)
    if form == "triton" and (backend == "triton" or q.dtype != torch.float64):
        from ._triton import tree_attention as kernels

        if isinstance(pack, TreePack):
            pack = pack.plan
        return kernels.tree_attention(q, k, v, end, scale, pack.tiles if isinstance(pack, TreePlan) else {})
    plan = pack if isinstance(pack, TreePlan) else pack.plan if isinstance(pack, TreePack) else plan_tree(pack)
    return _TreeAttention.apply(q, k, v, plan, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> None:
    total = end.shape[0]
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} for a pack of {total} tokens"
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3 or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise UsageError(f"tree_attention: {shapes}; expected [T, Hq, D], [T, Hk, D] and [T, Hk, Dv]")
    if not q.shape[0] == k.shape[0] == total:
        raise UsageError(f"tree_attention: {shapes}; expected as many queries and keys as packed tokens")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise UsageError(f"tree_attention: {shapes}; expected a number of query heads that is a multiple of Hk")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise UsageError(f"tree_attention: types {q.dtype}, {k.dtype}, {v.dtype}; expected one floating type")
    if not q.device == k.device == v.device == end.device:
        devices = f"{q.device}, {k.device}, {v.device} and {end.device}"
        raise UsageError(f"tree_attention: q, k, v and the pack are on {devices}; expected one device: pack.to(...)")


class _TreeAttention(torch.autograd.Function):
    """The torch form. Inside, ``out`` and sums of gradients are fp32, or float64 for float64."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, scale: float) -> tuple[Tensor, Tensor]:
        # The CPU's kernel takes heads to be dense whatever their strides say.
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        dtype = statistics_dtype(q)
        whole = _whole(plan)
        out = q.new_empty((0 if whole else q.shape[0], q.shape[1], v.shape[2]), dtype=dtype)
        lse = q.new_empty(out.shape[:2], dtype=dtype)
        for batch in plan.batches:
            o, s = causal(*(_gather(x, batch) for x in (q, k, v)), scale=scale)
            if whole:
                out, lse = o.flatten(0, 1), s.flatten(0, 1)
            else:
                _scatter(out, o, batch)
                _scatter(lse, s, batch)
        for a, b, e in plan.rectangles:
            o, s = piece(q[None, b:e], k[None, a:b], v[None, a:b], causal=False, scale=scale)
            join(out[None, b:e], lse[None, b:e], o, s)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        plan, scale, grad = ctx.plan, ctx.scale, grad.contiguous()
        if _whole(plan):
            pieces = [_gather(x, plan.batches[0]) for x in (grad, q, k, v, out, lse)]
            gradients = causal_backward(*pieces, scale=scale, dtype=lse.dtype)
            return *(x.flatten(0, 1).to(q.dtype) for x in gradients), None, None
        dq, dk, dv = (torch.empty_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
        later = []
        for batch in plan.batches:
            pieces = [_gather(x, batch) for x in (grad, q, k, v, out, lse)]
            if batch.drop_place.numel():
                # Places that are no queries have probability exp(s - inf) = 0 of everything.
                pieces[5].view(-1, lse.shape[1]).index_fill_(0, batch.drop_place, torch.inf)
                pieces[0].view(-1, *grad.shape[1:]).index_fill_(0, batch.drop_place, 0)
            gradients = causal_backward(*pieces, scale=scale, dtype=lse.dtype)
            for total, share in zip((dq, dk, dv), gradients, strict=True):
                _scatter(total, share, batch)
            if batch.more_place.numel():
                chosen = [x.reshape(-1, *x.shape[2:]).index_select(0, batch.more_place) for x in gradients[1:]]
                later.append((batch.more_token, chosen))
        # Own gradients are assigned; those of repeated tokens are added when all are there.
        for token, (more_k, more_v) in later:
            _add(dk, token, more_k)
            _add(dv, token, more_v)
        for a, b, e in plan.rectangles:
            pieces = [x[None, b:e] for x in (grad, q)] + [x[None, a:b] for x in (k, v)]
            pieces += [x[None, b:e] for x in (out, lse)]
            more_q, more_k, more_v = piece_backward(*pieces, causal=False, scale=scale)
            dq[b:e] += more_q[0]
            dk[a:b] += more_k[0]
            dv[a:b] += more_v[0]
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None


def _whole(plan: TreePlan) -> bool:
    """Whether one plain batch is the pack: rows of one length that share nothing."""
    return len(plan.batches) == 1 and plan.batches[0].start == 0


def _gather(x: Tensor, batch: CausalBatch) -> Tensor:
    """[T, ...] to [n, m, ...], a view where the batch is plain."""
    n, m = batch.index.shape
    if batch.start >= 0:
        return x[batch.start : batch.start + n * m].unflatten(0, (n, m))
    return x.index_select(0, batch.index.view(-1)).view(n, m, *x.shape[1:])


def _scatter(x: Tensor, values: Tensor, batch: CausalBatch) -> None:
    """Write the own places of values [n, m, ...] to x [T, ...]."""
    n, m = batch.index.shape
    values = values.reshape(n * m, *x.shape[1:])
    if batch.start >= 0:
        x[batch.start : batch.start + n * m] = values
        return
    if batch.drop_place.numel():
        values = values.index_select(0, batch.own_place)
    x.index_copy_(0, batch.own_token, values.to(x.dtype))


def _add(x: Tensor, token: Tensor, values: Tensor) -> None:
    """Add values to x at tokens, which may repeat, in an order that is always the same."""
    if x.is_cuda:
        x.index_put_((token,), values.to(x.dtype), accumulate=True)
    else:
        x.index_add_(0, token, values.to(x.dtype))


_ACTIVE: dict[int, TreePlan] = {}
"""Plans in use, by the identity of the configuration that a model's attention modules hold."""

_SUPPORTED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Of a probe, relative to its largest value; models turn positions in fp32 whatever their own type."""


@contextmanager
def use_tree_attention(model: nn.Module, pack: TreePack | TreePlan) -> Iterator[None]:
    """Let ``model(input_ids=pack.tokens[None], position_ids=pack.positions[None])`` compute the tree, exactly.

    Inside the block every call of the model must be on this pack, without an attention mask and without a cache. The
    configuration is as it was afterwards, also after an exception. With gradient checkpointing the backward pass
    computes the forward pass again, so it must be inside the block too; else it may be outside.

    Raises:
        UsageError: the model is not one that ``supports_tree_attention``; also from the model's call, where it would
            be inexact: an attention mask, a window shorter than a path, dropout of attention.
    """
    if not supports_tree_attention(model):
        raise UsageError(
            f"use_tree_attention: {type(model).__name__} does not compute the same on a pack as on each row alone; "
            "expected a causal model of transformers that calls the attention of its configuration with full "
            "attention and no dropout in it. Train it on separate rows"
        )
    with _switched(model, pack.plan if isinstance(pack, TreePack) else pack):
        yield


def supports_tree_attention(model: nn.Module) -> bool:
    """Return whether the model computes on a pack what it computes on each row alone.

    Decided once per model, by trying it on a tree of two branches. A model in training mode with dropout of attention
    is not supported, and is again in evaluation mode.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "_attn_implementation"):
        return False
    if model.training and any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop")):
        return False
    if model not in _SUPPORTED:
        _SUPPORTED[model] = _probe(model)
    return _SUPPORTED[model]


def _probe(model: nn.Module) -> bool:
    parameter, config = next(model.parameters()), cast(Any, model.config)
    size = min(8, int(getattr(config.get_text_config(), "vocab_size", 8)))
    rows = [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6, 7]]
    pack = pack_tree([[token % size for token in row] for row in rows]).to(parameter.device)
    places = [place[place >= 0] for place in pack.place]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            alone = torch.cat([_first(model, pack.tokens[place], pack.positions[place]) for place in places])
            with _switched(model, pack.plan):
                packed = _first(model, pack.tokens, pack.positions)[torch.cat(places)]
    except Exception:  # a model that cannot be called like this, or whose call says why it would be inexact
        return False
    finally:
        for module, training in modes:
            module.training = training
    tolerance = _TOLERANCE.get(parameter.dtype, 3e-2)
    return bool((packed - alone).abs().max() <= tolerance * alone.abs().max())


def _first(model: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    return model(input_ids=tokens[None], position_ids=positions[None], use_cache=False)[0][0]


@contextmanager
def _switched(model: nn.Module, plan: TreePlan) -> Iterator[None]:
    _register()
    configs = _configs(model.config)
    root = configs[0]
    before = [(config, config._attn_implementation, _ACTIVE.get(id(config))) for config in configs]
    try:
        root._attn_implementation = _NAME
        _ACTIVE.update({id(config): plan for config in configs})
        yield
    finally:
        for config, implementation, outer in before:
            config._attn_implementation = implementation
            if outer is None:
                _ACTIVE.pop(id(config), None)
            else:
                _ACTIVE[id(config)] = outer


def _configs(config: Any) -> list[Any]:
    """A configuration and all those inside it, outer ones first."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return [config] + [found for child in inner if child is not None for found in _configs(child)]


@functools.cache
def _register() -> None:
    """Make the attention known to transformers, which is loaded where there is a model of it."""
    sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    sys.modules["transformers.masking_utils"].ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _no_mask)


def _no_mask(*_: Any, **options: Any) -> None:
    """In place of a mask: the plan says what is visible. ``local_size`` is a window or a chunk."""
    # By the model's own configuration: other threads may be reading other packs.
    window, plan = options.get("local_size"), _ACTIVE.get(id(options.get("config")))
    if window is not None and plan is not None and window < plan.longest:
        raise UsageError(f"tree attention: the model reads {window} tokens back; a path here has {plan.longest}")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query, key and value [1, H, T, D] to out [1, T, H, D]."""
    plan = _ACTIVE.get(id(getattr(module, "config", None)))
    if plan is None:
        raise UsageError("tree attention: the model was called outside `use_tree_attention`")
    inexact = [name for name in ("softcap", "s_aux", "position_bias", "cache") if options.get(name) is not None]
    inexact += ["attention_mask"] * (attention_mask is not None) + ["dropout"] * (dropout > 0)
    if inexact or not options.get("is_causal", getattr(module, "is_causal", True)):
        raise UsageError(f"tree attention: the model asks for {', '.join(inexact) or 'attention that is not causal'}")
    if sliding_window is not None and sliding_window < plan.longest:
        raise UsageError(f"tree attention: the model reads {sliding_window} tokens back; a path has {plan.longest}")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        shapes = f"{tuple(query.shape)} and keys {tuple(key.shape)}"
        raise UsageError(f"tree attention: queries {shapes}; expected one packed sequence and no cache")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    out, _ = tree_attention(query, key, value, plan, scale=scaling)
    return out[None], None
