"""PPO (1707.06347) with generalised advantage estimation (1506.02438) and a clipped value loss."""

from __future__ import annotations

from collections.abc import Sequence

from .loss import Loss, aggregate, slope
from .rewards import token_rewards
from .trajectories import PerToken, Trajectory, sequences


def gae(rewards: Sequence[float], values: Sequence[float], gamma: float, lam: float) -> list[float]:
    """``A_t = Σ_l (γλ)^l δ_{t+l}``, ``δ_t = r_t + γ V_{t+1} - V_t``; after the last token the value is 0.

    Only trained tokens are counted, so a token sees the value of the next trained one.
    """
    following = [*values[1:], 0.0][: len(values)]
    delta = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(delta))) for t in range(len(delta))]


def advantages(trajectories: list[Trajectory], *, gamma: float = 1.0, lam: float = 1.0) -> PerToken:
    """GAE along each trajectory, not yet whitened."""
    result = {}
    for trajectory in trajectories:
        values = [token.old_value for token in trajectory.tokens]
        estimates = gae(token_rewards(trajectory), values, gamma, lam)
        result.update({token.place: a for token, a in zip(trajectory.tokens, estimates, strict=True)})
    return result


def row_advantages(trajectories: list[Trajectory], *, gamma: float = 1.0, lam: float = 1.0) -> PerToken:
    """GAE inside each row alone, whose last token is paid the whole return of its episode and no other one anything
    (verl-agent, where a row is a turn)."""
    result = {}
    for trajectory in trajectories:
        for row in sequences([trajectory]):
            rewards = [0.0] * (len(row) - 1) + [trajectory.outcome]
            estimates = gae(rewards, [token.old_value for token in row], gamma, lam)
            result.update({token.place: a for token, a in zip(row, estimates, strict=True)})
    return result


def value_loss(
    trajectories: list[Trajectory],
    raw: PerToken,
    *,
    coefficient: float = 1.0,
    clip: float | None = 0.5,
    mode: str = "token-mean",
    width: int | None = None,
) -> Loss:
    """``coefficient · ½ agg(max((v - R)², (clip(v, v_old ± c) - R)²))``; the target is ``R = A + v_old`` with A as it
    was before whitening."""
    losses, slopes = {}, {}
    for trajectory in trajectories:
        for token in trajectory.tokens:
            target = raw[token.place] + token.old_value
            error = token.value - target
            loss, derivative = error**2 / 2, error
            if clip is not None:
                near = min(max(token.value, token.old_value - clip), token.old_value + clip)
                if (near - target) ** 2 > error**2:
                    loss, derivative = (near - target) ** 2 / 2, 0.0
            losses[token.place], slopes[token.place] = coefficient * loss, coefficient * derivative
    return Loss(aggregate(trajectories, losses, mode, width), values=slope(trajectories, slopes, mode, width))
