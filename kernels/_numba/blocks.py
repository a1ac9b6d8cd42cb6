"""The elementwise parts of a Llama block in one pass over memory each.

- ``add_norm``: a residual sum and its root mean square norm.
- ``gated``, ``gated_backward``: silu(gate) * up and its gradient.
- ``norm``, ``norm_backward``: the norm alone and its gradient.

Arrays of int16 hold bfloat16; sums are float32 then.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .scalars import exp, kernel, narrow, widen


@kernel
def add_norm(x: Any, y: Any, eps: Any, total: Any, normed: Any) -> None:
    """``total`` = x + y and ``normed`` = total / sqrt(mean(total^2) + eps), rows of [T, H]; rounded like ``total``."""
    rows, size = x.shape
    for t in range(rows):
        a, b, c, n = x[t], y[t], total[t], normed[t]
        squares = eps * 0
        for d in range(size):
            c[d] = narrow(widen(a[d]) + widen(b[d]), c)
        for d in range(size):
            squares += widen(c[d]) * widen(c[d])
        inverse = 1 / math.sqrt(squares / size + eps)
        for d in range(size):
            n[d] = narrow(widen(c[d]) * inverse, n)


@kernel
def gated(both: Any, one: Any, out: Any) -> None:
    """``out`` = silu(gate) * up [T, I] of both [T, 2 I]; ``one`` is 1 in the type of the sums."""
    rows, size = out.shape
    for t in range(rows):
        gate, up, o = both[t, :size], both[t, size:], out[t]
        for d in range(size):
            x = widen(gate[d])
            e = exp(-abs(x))
            sigmoid = (one if x >= 0 else e) / (one + e)
            o[d] = narrow(x * sigmoid * widen(up[d]), o)


@kernel
def gated_backward(grad: Any, both: Any, one: Any, found: Any) -> None:
    """``found`` [T, 2 I]: the gradient of ``gated`` with respect to ``both``, from that of its result [T, I]."""
    rows, size = grad.shape
    sigmoid = np.empty(size, grad.dtype)
    for t in range(rows):
        g, gate, up = grad[t], both[t, :size], both[t, size:]
        grad_gate, grad_up = found[t, :size], found[t, size:]
        # A loop for every row that is written: more overlaps than that are too many to check for vector code.
        for d in range(size):
            e = exp(-abs(gate[d]))
            sigmoid[d] = (one if gate[d] >= 0 else e) / (one + e)
        for d in range(size):
            grad_up[d] = g[d] * gate[d] * sigmoid[d]
        for d in range(size):
            grad_gate[d] = g[d] * up[d] * sigmoid[d] * (one + gate[d] * (one - sigmoid[d]))


@kernel
def norm(x: Any, eps: Any, normed: Any, inverse: Any) -> None:
    """``normed`` = x / sqrt(mean(x^2) + eps) of rows [T, H], and the factor ``inverse`` [T]."""
    rows, size = x.shape
    for t in range(rows):
        a, n = x[t], normed[t]
        squares = eps * 0
        for d in range(size):
            squares += a[d] * a[d]
        factor = 1 / math.sqrt(squares / size + eps)
        inverse[t] = factor
        for d in range(size):
            n[d] = a[d] * inverse[t]


@kernel
def norm_backward(grad: Any, normed: Any, inverse: Any) -> None:
    """Turn the gradient [T, H] with respect to ``normed`` into that with respect to x, in place."""
    rows, size = grad.shape
    for t in range(rows):
        g, n = grad[t], normed[t]
        mean = inverse[t] * 0
        for d in range(size):
            mean += g[d] * n[d]
        mean /= size
        for d in range(size):
            g[d] = (g[d] - n[d] * mean) * inverse[t]
