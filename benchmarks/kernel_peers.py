"""What ``benchmarks.kernels`` compares the fused head with.

- ``Problem``: hidden states, weights, targets and the gradients of the results.
- ``head_variants``: every way to the loss of a problem that this machine can run, by name.
- ``row_variants``: likewise from logits.
- ``add_peers``: packages that join where they can be imported.

*naive*, *TRL* and *512-token chunks* are our own short statements of published algorithms, not the packages: of TRL the
formulas ``selective_log_softmax`` and ``entropy_from_logits``; of verl (``FusedLinearForPPO``) and of Liger (what its
``LigerFusedLinearScaledCrossEntropyFunction`` falls back to without Hopper) the chunks of 512 tokens with whole rows of
logits, recomputed in the backward pass. The packages themselves join where they can be imported.
"""

from __future__ import annotations

import atexit
import importlib
import shutil
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.linear_logprob import fused_linear_logprob, fused_linear_policy_loss
from ..kernels.logprob import logprob_entropy

OURS = "agentropy"
OURS_INSIDE = "agentropy, loss inside"


class Problem(NamedTuple):
    """Leaves that need gradients, and constants."""

    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    target: Tensor
    factor: Tensor
    """fp32[2, N]: gradients of log-probability and entropy."""


Outcome = tuple[Tensor, Tensor, Tensor | None]
"""(loss, logprob[N], entropy[N] or None where the peer has none)"""
Head = Callable[[Problem], Outcome]
Row = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(logits[N, V], target[N]) to (logprob, entropy)."""


def _loss(problem: Problem, logprob: Tensor, entropy: Tensor | None) -> Outcome:
    loss = (problem.factor[0] * logprob).sum()
    if entropy is not None:
        loss = loss + (problem.factor[1] * entropy).sum()
    return loss, logprob, entropy


def ours(problem: Problem) -> Outcome:
    """Four products, logits in tiles."""
    found = fused_linear_logprob(problem.hidden, problem.weight, problem.target)
    return _loss(problem, found.logprob, found.entropy)


def ours_inside(problem: Problem) -> Outcome:
    """Three products, logits in rows."""
    factor = problem.factor
    return fused_linear_policy_loss(
        problem.hidden,
        problem.weight,
        problem.target,
        token_loss=lambda logprob, entropy, index: factor[0, index] * logprob + factor[1, index] * entropy,
    )


def ours_rows(problem: Problem) -> Outcome:
    """All logits in memory, in the type of the inputs; then ``logprob_entropy``, in place."""
    found = logprob_entropy(problem.hidden @ problem.weight.T, problem.target, inplace_backward=True)
    return _loss(problem, found.logprob, found.entropy)


def naive_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Autograd through one log-softmax in fp32."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    return logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(dim=-1)


def trl_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """TRL's two formulas: log-probabilities row by row, entropies in chunks of 128 rows, in the type of the logits."""
    if logits.dtype in (torch.float32, torch.float64):
        lse = torch.stack([row.logsumexp(dim=-1) for row in logits])
        logprob = logits.gather(1, target[:, None])[:, 0] - lse
    else:
        rows = zip(logits, target, strict=True)
        logprob = torch.stack([row.log_softmax(dim=-1).gather(0, label[None])[0] for row, label in rows])
    chunks = (chunk.log_softmax(dim=-1) for chunk in logits.split(128))
    return logprob, torch.cat([-(logp.exp() * logp).sum(dim=-1) for logp in chunks])


def of_rows(row: Row) -> Head:
    """A head from the product with all logits in memory."""

    def head(problem: Problem) -> Outcome:
        return _loss(problem, *row(problem.hidden @ problem.weight.T, problem.target))

    return head


class _Chunks(torch.autograd.Function):
    """512 tokens at a time: logits in the type of the inputs, statistics in fp32, results in the type of the inputs."""

    size = 512

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, target)
        found = []
        for x, label in zip(hidden.split(_Chunks.size), target.split(_Chunks.size), strict=True):
            z = (x @ weight.T).float()
            p, logp = z.softmax(dim=-1), z.log_softmax(dim=-1)
            entropy = z.logsumexp(dim=-1) - (p * z).sum(dim=-1)
            found.append((logp.gather(1, label[:, None])[:, 0].to(x.dtype), entropy.to(x.dtype)))
        logprobs, entropies = zip(*found, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, target = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), _Chunks.size):
            rows = slice(start, start + _Chunks.size)
            x, label = hidden[rows], target[rows]
            z = (x @ weight.T).float()
            p, logp = z.softmax(dim=-1), z.log_softmax(dim=-1)
            entropy = z.logsumexp(dim=-1) - (p * z).sum(dim=-1)
            onehot = torch.zeros_like(p).scatter_(1, label[:, None], 1)
            dz = grad_logprob[rows, None].float() * (onehot - p)
            dz -= p * (logp + entropy[:, None]) * grad_entropy[rows, None].float()
            dz = dz.to(x.dtype)
            grad_hidden[rows] = dz @ weight
            grad_weight += dz.T @ x
        return grad_hidden, grad_weight, None


def chunks(problem: Problem) -> Outcome:
    """verl's and Liger's torch form."""
    return _loss(problem, *_Chunks.apply(problem.hidden, problem.weight, problem.target))


def add_peers(folder: Path) -> None:
    """Make the packages in ``folder`` importable, its wheels unpacked, without what they depend on."""
    wheels = sorted(folder.glob("*.whl"))
    if wheels:
        site = tempfile.mkdtemp(prefix="peers-")
        atexit.register(shutil.rmtree, site, ignore_errors=True)
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        sys.path.insert(0, site)
    sys.path.insert(0, str(folder))


def head_variants(device: str) -> dict[str, Head]:
    """Ours first, then what it is measured against."""
    found: dict[str, Head] = {
        OURS: ours,
        OURS_INSIDE: ours_inside,
        "agentropy, all logits": ours_rows,
        "naive autograd": of_rows(naive_rows),
        "TRL formulas": of_rows(trl_rows),
        "512-token chunks": chunks,
    }
    return found | _liger() | (_verl() | _cut_cross_entropy() if device == "cuda" else {})


def row_variants() -> dict[str, Row]:
    """From logits."""
    return {
        OURS: lambda logits, target: logprob_entropy(logits, target, inplace_backward=True)[:2],
        "naive autograd": naive_rows,
        "TRL formulas": trl_rows,
        "torch.compile of naive": torch.compile(naive_rows, dynamic=False),
    }


def _liger() -> dict[str, Head]:
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction
    except ImportError:
        return {}

    def head(problem: Problem) -> Outcome:
        found = LigerFusedLinearScaledCrossEntropyFunction.apply(
            problem.hidden, problem.weight, problem.target, return_entropy=True
        )
        return _loss(problem, -found[0], found[1])

    return {"liger_kernel": head}


def _verl() -> dict[str, Head]:
    """verl's Triton kernels alone: importing the package would need all that it depends on."""
    entry = next(
        (Path(each, "verl/utils/kernel") for each in sys.path if Path(each, "verl/utils/kernel").is_dir()), None
    )
    if entry is None:
        return {}
    device = types.ModuleType("verl.utils.device")
    vars(device).update(
        get_device_name=lambda: "cuda",
        get_device_capability=torch.cuda.get_device_capability,
        is_cuda_available=True,
        get_torch_device=lambda: torch.cuda,
    )
    for name in ("verl", "verl.utils", "verl.utils.kernel"):
        package = types.ModuleType(name)
        package.__path__ = [str(entry.parents[1 - name.count(".")])] if name.count(".") < 2 else [str(entry)]
        sys.modules[name] = package
    sys.modules["verl.utils.device"] = device
    apply = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy

    def head(problem: Problem) -> Outcome:
        return _loss(problem, *apply(problem.hidden, problem.weight, problem.target, 1.0, "none"))

    return {"verl (Triton)": head}


def _cut_cross_entropy() -> dict[str, Head]:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        return {}

    def head(problem: Problem) -> Outcome:
        nll = linear_cross_entropy(problem.hidden, problem.weight, problem.target, reduction="none")
        return _loss(problem, -nll, None)

    return {"cut_cross_entropy (no entropy)": head}
