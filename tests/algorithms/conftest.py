"""Random ragged batches for every test of recipes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from agentropy.algorithms import Minibatch
from tests.algorithms.view_site import browser, contexts, open_page, site  # noqa: F401 - fixtures of two files

Sample = tuple[Minibatch, Tensor, Tensor]


def make_batch(seed: int, *, groups: int = 3, size: int = 4, window: bool = False) -> Sample:
    """A float64 batch with ragged turns, and current log-probabilities and entropies near its old ones.

    One row per trajectory, or per turn in ``window`` mode. The last trajectory has no trained token. The second
    trajectory of each group is a branch of the first one: they share its first turn.
    """
    rng = np.random.default_rng(seed)
    rows: list[dict[str, np.ndarray | int | float]] = []
    for trajectory in range(groups * size):
        lengths = rng.integers(1, 6, size=rng.integers(1, 5))
        pieces, reward = [], float(rng.choice([0.0, 1.0, rng.normal()]))
        for turn, length in enumerate(lengths):
            pieces += [np.full(rng.integers(1, 4), -1), np.full(length, turn)]
        if trajectory == groups * size - 1:
            pieces = [np.full(3, -1)]
        walks = (
            [np.concatenate(pieces[: k + 2]) for k in range(0, len(pieces), 2)] if window else [np.concatenate(pieces)]
        )
        for k, turn in enumerate(walks):
            if window:
                turn = np.where(turn == k, turn, -1)
            rows.append({"turn": turn, "trajectory": trajectory, "group": trajectory // size, "returns": reward})
    width = max(len(row["turn"]) for row in rows)
    turn = np.full((len(rows), width), -1)
    for row, values in enumerate(rows):
        turn[row, : len(values["turn"])] = values["turn"]
    old, entropy = -rng.exponential(1.0, turn.shape), rng.exponential(0.7, turn.shape)
    batch = Minibatch(
        mask=torch.from_numpy(turn >= 0),
        turn=torch.from_numpy(turn),
        old_logprobs=torch.from_numpy(old),
        old_entropy=torch.from_numpy(entropy),
        ref_logprobs=torch.from_numpy(old + rng.normal(0, 0.3, turn.shape)),
        group=torch.tensor([row["group"] for row in rows]),
        trajectory=torch.tensor([row["trajectory"] for row in rows]),
        returns=torch.tensor([row["returns"] for row in rows], dtype=torch.float64),
    )
    logprobs = torch.from_numpy(old + rng.normal(0, 0.4, turn.shape))
    paid = np.round(rng.normal(size=(groups * size, turn.max() + 1)), 1)
    branch = np.array([row["trajectory"] % size == 1 for row in rows])
    owner = np.array([row["trajectory"] for row in rows])
    node = np.where(turn >= 0, owner[:, None] * 10 + turn, -1)
    observed = rng.integers(0, 3, (groups * size, turn.max() + 1))
    batch = batch.replace(
        turn_rewards=torch.from_numpy(paid)[batch.trajectory],
        values=torch.from_numpy(rng.normal(size=turn.shape)),
        rollout_logprobs=torch.from_numpy(old + rng.normal(0, 0.3, turn.shape)),
        node=torch.from_numpy(np.where(branch[:, None] & (turn == 0), node - 10, node)),
        anchor=[tuple(f"room {place}" for place in observed[row["trajectory"]]) for row in rows],
        token_rewards=torch.from_numpy(np.where(turn >= 0, np.round(rng.normal(size=turn.shape), 1), 0.0)),
    )
    return batch, logprobs, torch.from_numpy(entropy * rng.uniform(0.5, 1.5, turn.shape))


@pytest.fixture(scope="session")
def ragged() -> Callable[..., Sample]:
    return make_batch
