"""A pool, a world and an engine in one process, for tests of the rollout loop."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from agentropy.agents.engines.base import Completion, Request, SamplingParams, StopReason
from agentropy.agents.formats import PlainFormat
from agentropy.agents.policies import EnginePolicy
from agentropy.agents.rollout import RolloutTask, rollout
from agentropy.agents.tokenizer import END, build_word_tokenizer
from agentropy.envs.pool import EnvResult

COMMANDS = ["go left", "go right", "look"]
SAYINGS = [
    "you are at door 1",
    "you are at door 2",
    "you are at door 3",
    "task is to reach door 3",
    "nothing happens",
]
TURNS = 6


@dataclass
class Corridor:
    """Three doors in a row; the task is to reach the third from the first within six turns."""

    task: str
    door: int = 1
    turn: int = 0

    def answer(self, slot, command=None):
        if self.task == "unreadable" or (self.task == "crashing" and self.turn == 2):
            info = {"task": self.task, "won": False, "failed": True}
            return EnvResult(slot, "", 0.0, True, False, info, failed=True, error="the world broke")
        text = f"you are at door {self.door} task is to reach door 3"
        if command is not None:
            self.turn += 1
            self.door += {"go left": -1, "go right": 1}.get(command, 0)
            self.door = max(1, self.door)
            text = f"you are at door {self.door}" if command in COMMANDS else "nothing happens"
        won = self.door == 3
        info = {
            "task": self.task,
            "won": won,
            "score": self.door / 3,
            "admissible": COMMANDS,
            "expert": "go right",
            "invalid": command is not None and command not in COMMANDS,
        }
        return EnvResult(slot, text, float(won), won, self.turn == TURNS, info)


@dataclass
class InlinePool:
    """The pool's contract in one process; answers come back in an order drawn from ``shuffle``."""

    num_envs: int
    shuffle: int = 0
    make: Callable[[str], Any] = Corridor
    """From a task to a world, a dataclass with ``answer(slot, command=None)``."""
    worlds: dict[int, Any] = field(default_factory=dict)
    pending: dict[int, EnvResult] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=list)
    last: dict[int, EnvResult] = field(default_factory=dict)
    forks: int = 0

    def reset(self, slot, *, task, seed):
        assert 0 <= slot < self.num_envs and slot not in self.pending
        self.worlds[slot] = self.make(task)
        self.seeds.append(seed)
        self.pending[slot] = self.worlds[slot].answer(slot)

    def fork(self, src, dst):
        assert src not in self.pending and dst not in self.pending and 0 <= dst < self.num_envs
        self.worlds[dst] = replace(self.worlds[src])
        self.pending[dst] = replace(self.last[src], slot=dst, reward=0.0)
        self.forks += 1

    def step(self, slot, action):
        assert slot not in self.pending
        self.pending[slot] = self.worlds[slot].answer(slot, action)

    def wait(self, slots, *, all):
        assert all
        order = np.random.default_rng(self.shuffle).permutation(sorted(slots))
        results = [self.pending.pop(slot) for slot in order.tolist()]
        self.last |= {result.slot: result for result in results}
        return results


@dataclass
class BabblingEngine:
    """Says random words that depend on the request alone, and writes down every request by its seed."""

    vocabulary: int
    end: int
    heard: dict[int, tuple[Request, Completion]] = field(default_factory=dict)
    batches: list[list[int]] = field(default_factory=list)
    released: list[list[int]] = field(default_factory=list)

    def generate(self, requests, params):
        self.batches.append([request.seed for request in requests])
        out = []
        for request in requests:
            generator = np.random.default_rng([request.seed, int(request.tokens.sum())])
            length = int(generator.integers(1, request.max_tokens + 1))
            tokens = generator.integers(self.vocabulary, size=length).astype(np.int32)
            if length < request.max_tokens or generator.random() < 0.5:
                tokens[-1] = self.end
            numbers = generator.random((4, length)).astype(np.float32)
            completion = Completion(tokens, *numbers, StopReason.STOP, version=3, cached_tokens=0)
            assert request.seed not in self.heard
            self.heard[request.seed] = (request, completion)
            out.append(completion)
        return out

    def release(self, prefixes=None):
        self.released += [prefix.tolist() for prefix in prefixes]


TOKENIZER = build_word_tokenizer([*COMMANDS, *SAYINGS])


def babble(tasks, *, slots=4, shuffle=0, max_context_tokens=400, **options):
    format = PlainFormat(TOKENIZER)
    engine = BabblingEngine(len(TOKENIZER), TOKENIZER.convert_tokens_to_ids(END))
    policy = EnginePolicy(engine, format, SamplingParams(), max_action_tokens=4)
    pool = InlinePool(slots, shuffle)
    trees = rollout(policy, pool, format, tasks, split="train", max_context_tokens=max_context_tokens, **options)
    return trees, engine


def act_seed(task: RolloutTask, member: int, turn: int) -> int:
    return int(np.random.SeedSequence((task.seed, member, turn)).generate_state(1, np.uint64)[0])
