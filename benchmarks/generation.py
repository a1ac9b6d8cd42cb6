"""How fast multi-turn episodes generate: the torch engine beside ``generate`` of transformers.

``python -m agentropy.benchmarks.generation`` plays the same greedy episodes with every variant, same model, same
run, variants in turn within each repetition so that a noisy machine disturbs all alike. Every turn appends an
observation and generates an action. It checks that all variants give the same tokens, prints medians and writes
JSON.

- *torch engine*: ``TorchEngine``; it reads only what is new.
- *re-prefill*: ``generate`` reads the whole history every turn.
- *cache kept*: ``generate`` is handed its own key-value cache of the turn before.

Prefill and decode are told apart by a second kind of episode with equally long turns, in which all but one token of
the action are part of the observation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel

from ..agents.engines import Request, SamplingParams
from ..agents.engines.torch_engine import TorchEngine
from ..agents.models import build_small_model, load_model
from ..errors import UsageError
from .machine import describe_machine, summary

ENGINE = "torch engine"
KEPT = "cache kept"
REPREFILL = "re-prefill"
VOCABULARY = 1000


class Episodes(NamedTuple):
    """The shape of a batch of episodes, in tokens."""

    batch: int
    turns: int
    prompt: int
    observation: int
    action: int

    def prompts(self, vocabulary: int) -> NDArray[np.int32]:
        """The first contexts, int32[batch, prompt]."""
        return np.random.default_rng(0).integers(8, vocabulary, (self.batch, self.prompt), dtype=np.int32)

    def observations(self, turn: int, vocabulary: int) -> NDArray[np.int32]:
        """What follows the action of ``turn``, int32[batch, observation]."""
        shape = (self.batch, self.observation)
        return np.random.default_rng(1 + turn).integers(8, vocabulary, shape, dtype=np.int32)


Act = Callable[[NDArray[np.int32]], NDArray[np.int32]]
"""Contexts int32[batch, L] to actions int32[batch, action]; called once per turn of one batch of episodes."""


def engine_player(engine: TorchEngine, episodes: Episodes) -> Act:
    """Act with the engine, from an empty cache."""
    engine.release()

    def act(contexts: NDArray[np.int32]) -> NDArray[np.int32]:
        requests = [Request(row, seed=i, max_tokens=episodes.action) for i, row in enumerate(contexts)]
        return np.stack([c.tokens for c in engine.generate(requests, SamplingParams(temperature=0))])

    return act


def transformers_player(model: Any, episodes: Episodes, keep_cache: bool) -> Act:
    """Act with ``model.generate``, with or without the cache of the turn before."""
    cache = DynamicCache() if keep_cache else None

    def act(contexts: NDArray[np.int32]) -> NDArray[np.int32]:
        ids = torch.from_numpy(contexts).long().to(model.device)
        options: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=episodes.action,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        return out[:, contexts.shape[1] :].cpu().numpy().astype(np.int32)

    return act


def play(act: Act, episodes: Episodes, vocabulary: int) -> tuple[float, NDArray[np.int32]]:
    """Play one batch of episodes; return the seconds spent acting and the actions int32[batch, turns x action]."""
    contexts = episodes.prompts(vocabulary)
    seconds = 0.0
    actions = []
    for turn in range(episodes.turns):
        started = time.perf_counter()
        action = act(contexts)
        seconds += time.perf_counter() - started
        actions.append(action)
        contexts = np.concatenate((contexts, action, episodes.observations(turn, vocabulary)), axis=1)
    return seconds, np.concatenate(actions, axis=1)


def measure(model: PreTrainedModel, episodes: Episodes, repetitions: int) -> dict[str, dict[str, float]]:
    """Return per variant the medians: seconds, tokens per second, speed-up of the engine, agreement."""
    vocabulary = model.config.vocab_size
    length = episodes.prompt + episodes.turns * (episodes.observation + episodes.action)
    engine = TorchEngine(model, max_batch=episodes.batch, cache_tokens=2 * episodes.batch * length)
    reading = episodes._replace(observation=episodes.observation + episodes.action - 1, action=1)
    players: dict[str, Callable[[Episodes], Act]] = {
        ENGINE: lambda e: engine_player(engine, e),
        KEPT: lambda e: transformers_player(model, e, keep_cache=True),
        REPREFILL: lambda e: transformers_player(model, e, keep_cache=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in players}
    reads: dict[str, list[float]] = {name: [] for name in players}
    actions: dict[str, NDArray[np.int32]] = {}
    for repetition in range(repetitions + 1):
        for name, player in players.items():
            spent, actions[name] = play(player(episodes), episodes, vocabulary)
            read, _ = play(player(reading), reading, vocabulary)
            if repetition:
                seconds[name].append(spent)
                reads[name].append(read)
    read_tokens = episodes.batch * (length - episodes.observation - episodes.action)
    sampled = episodes.batch * episodes.turns * episodes.action
    results = {}
    for name in players:
        spent, read = statistics.median(seconds[name]), statistics.median(reads[name])
        decoding = max(spent - read, 1e-9)
        results[name] = {
            "seconds": spent,
            "action_tokens_per_second": sampled / spent,
            "prefill_tokens_per_second": read_tokens / read,
            "decode_tokens_per_second": sampled * (episodes.action - 1) / episodes.action / decoding,
            "slower_than_engine": statistics.median(
                other / own for other, own in zip(seconds[name], seconds[ENGINE], strict=True)
            ),
            "equal_rows": float((actions[name] == actions[ENGINE]).all(axis=1).mean()),
        }
    return results


def show(console: Console, episodes: Episodes, results: dict[str, dict[str, float]]) -> None:
    """Print one table."""
    title = (
        f"batch {episodes.batch}, {episodes.turns} turns, prompt {episodes.prompt}, "
        f"observation {episodes.observation}, action {episodes.action} tokens"
    )
    table = Table(title=title)
    headings = ("seconds", "action\ntok/s", "prefill\ntok/s", "decode\ntok/s", "engine\nfaster", "equal")
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{row['action_tokens_per_second']:,.0f}",
            f"{row['prefill_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.0f}",
            "" if name == ENGINE else f"{row['slower_than_engine']:.2f}x",
            f"{row['equal_rows']:.0%}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 1 when a variant's greedy tokens differ from the engine's."""
    parser = argparse.ArgumentParser(prog="agentropy.benchmarks.generation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="folder or hub name; a small random Llama by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=150)
    parser.add_argument("--observation", type=int, default=40)
    parser.add_argument("--action", type=int, default=8, help="at least 2")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "generation.json")
    options = parser.parse_args(arguments)
    shape = (options.turns, options.prompt, options.observation, options.repetitions, *options.batch)
    if min(shape) < 1 or options.action < 2:
        raise UsageError("sizes must be at least 1, and --action at least 2")

    model: PreTrainedModel
    if options.model:
        model, _ = load_model(options.model, dtype=torch.float32, device="cpu")
    else:
        model = build_small_model(VOCABULARY)
    model.eval()
    machine = describe_machine(("torch", "transformers")) | {"threads": torch.get_num_threads()}
    console = Console()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(summary(machine))
    console.print(f"{parameters / 1e6:.1f} M parameters, {machine['threads']} threads, float32, greedy")
    measured = []
    for batch in options.batch:
        episodes = Episodes(batch, options.turns, options.prompt, options.observation, options.action)
        results = measure(model, episodes, options.repetitions)
        show(console, episodes, results)
        measured.append({"episodes": episodes._asdict(), "results": results})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": machine,
        "model": {"name": options.model or "small Llama, random weights", "parameters": parameters},
        "repetitions": options.repetitions,
        "measured": measured,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"written to {options.out}")
    return int(any(row["equal_rows"] < 1 for entry in measured for row in entry["results"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
