"""How fast, how lean and how exact the kernels are, beside what others do.

``python -m agentropy.benchmarks.kernels`` measures on the CPU the language model's head: log-probability and entropy of
tokens from hidden states, forward and backward. With ``--device cuda`` it measures the head, the row kernel, sampling
and reductions on a GPU. All variants of a table run in one process on the same inputs, in turn within each repetition,
so that a noisy machine disturbs all alike; times are medians.

- *extra memory*: the highest use during one forward and backward pass above that before it, gradients included.
- *|Δ logp|*, *|Δ H|*: the largest difference from float64 on the same rounded inputs, over some rows.

``benchmarks.kernel_peers`` says what the variants are. ``--peers FOLDER`` adds packages from a folder of wheels, or of
what they unpack to: liger_kernel, verl (its Triton kernels), cut_cross_entropy.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..errors import UsageError
from ..kernels.sampling import sample
from ..kernels.segments import gae, segment_mean
from .kernel_peers import OURS, Head, Problem, add_peers, head_variants, row_variants
from .machine import describe_machine, summary

CPU_SHAPES = [(2048, 576, 49152), (1024, 896, 151936)]
GPU_SHAPES = [(16384, 896, 151936), (16384, 2048, 151936), (8192, 4096, 151936), (16384, 576, 49152)]
QUICK_SHAPES = [(256, 128, 4099)]
SPREADS = (2.0, 6.0, 12.0)
"""Standard deviations of logits; 6 is what the timed problems have."""
TILES = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 256, 64, 8, 3), (64, 128, 64, 4, 3)]
"""Of the fused head on sm_90: those that spill no registers in either kernel."""

Row = dict[str, Any]


def make_problem(shape: tuple[int, int, int], dtype: torch.dtype, device: str, spread: float = 6.0) -> Problem:
    """Random inputs with logits of standard deviation ``spread``, and targets drawn from some of them."""
    count, size, vocabulary = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(count, size, generator=generator, device=device)
    weight = torch.randn(vocabulary, size, generator=generator, device=device) * (spread / size**0.5)
    target = torch.randint(vocabulary, (count,), generator=generator, device=device)
    factor = torch.randn(2, count, generator=generator, device=device)
    return Problem(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, factor)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def extra_memory(work: Callable[[], Any], device: str) -> int | None:
    """Bytes at the highest point of ``work`` above those before; None where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts again
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def exact(problem: Problem, rows: int) -> tuple[Tensor, Tensor]:
    """Float64 log-probability and entropy of the first ``rows`` tokens."""
    weight = problem.weight.detach().double()
    found = []
    for x, target in zip(problem.hidden.detach()[:rows].split(32), problem.target[:rows].split(32), strict=True):
        logp = torch.log_softmax(x.double() @ weight.T, dim=-1)
        found.append((logp.gather(1, target[:, None])[:, 0], -(logp.exp() * logp).sum(dim=-1)))
    logprobs, entropies = zip(*found, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def errors(problem: Problem, variant: Head, truth: tuple[Tensor, Tensor]) -> Row:
    """Largest differences of log-probability and entropy from those of the first tokens."""
    rows = len(truth[0])
    part = Problem(problem.hidden[:rows], problem.weight, problem.target[:rows], problem.factor[:, :rows])
    with torch.no_grad():
        _, logprob, entropy = variant(part)
    return {
        "logprob_error": float((logprob - truth[0]).abs().max()),
        "entropy_error": None if entropy is None else float((entropy - truth[1]).abs().max()),
    }


def measure_head(shape: tuple[int, int, int], dtype: torch.dtype, device: str, repetitions: int) -> list[Row]:
    """One row per variant: seconds forward and both, effective TFLOP/s, extra memory, largest errors."""
    problem = make_problem(shape, dtype, device)
    product = 2.0 * shape[0] * shape[1] * shape[2]
    variants = head_variants(device)
    forward: dict[str, list[float]] = {name: [] for name in variants}
    both: dict[str, list[float]] = {name: [] for name in variants}
    failed: dict[str, str] = {}
    memory: dict[str, int | None] = {}
    for repetition in range(repetitions + 1):
        for name, variant in variants.items():
            if name in failed:
                continue

            def step(variant: Head = variant) -> None:
                problem.hidden.grad = problem.weight.grad = None
                variant(problem)[0].backward()

            def look(variant: Head = variant) -> None:
                with torch.no_grad():
                    variant(problem)

            problem.hidden.grad = problem.weight.grad = None
            try:
                if repetition == 0:  # warms up, and compiles
                    step()
                    problem.hidden.grad = problem.weight.grad = None
                    memory[name] = extra_memory(step, device)
                    continue
                forward[name].append(timed(look, device))
                both[name].append(timed(step, device))
            except Exception as error:  # a peer that cannot run this shape is a result too
                failed[name] = _first_line(error)
                if name == OURS:
                    raise
    problem.hidden.grad = problem.weight.grad = None
    truth = exact(problem, min(shape[0], 512 if device == "cuda" else 64))
    results = []
    for name, variant in variants.items():
        row: Row = {"variant": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
        if name in failed:
            results.append(row | {"failed": failed[name]})
            continue
        seconds, total = statistics.median(forward[name]), statistics.median(both[name])
        row |= {
            "forward_seconds": seconds,
            "seconds": total,
            "noise": (max(both[name]) - min(both[name])) / total,
            "forward_tflops": product / seconds / 1e12,
            "slower": statistics.median(a / b for a, b in zip(both[name], both[OURS], strict=True)),
            "extra_bytes": memory[name],
        }
        results.append(row | errors(problem, variant, truth))
    return results


def measure_accuracy(shape: tuple[int, int, int], device: str, rows: int) -> list[Row]:
    """Largest errors of every variant in bf16 for flat to peaked distributions."""
    results = []
    for spread in SPREADS:
        problem = make_problem(shape, torch.bfloat16, device, spread)
        truth = exact(problem, rows)
        for name, variant in head_variants(device).items():
            row: Row = {"variant": name, "spread": spread}
            try:
                results.append(row | errors(problem, variant, truth))
            except Exception as error:  # a peer that cannot run this shape is a result too
                results.append(row | {"failed": _first_line(error)})
    return results


def measure_rows(count: int, vocabulary: int, dtype: torch.dtype, repetitions: int) -> list[Row]:
    """The row kernel on the GPU: effective GB/s of one read forward, one read and one write backward."""
    logits = [torch.randn(count, vocabulary, device="cuda", dtype=dtype) * 3 for _ in range(2)]
    target = torch.randint(vocabulary, (count,), device="cuda")
    size = logits[0].numel() * logits[0].element_size()
    results = []
    for name, variant in row_variants().items():
        forward, backward = [], []
        row: Row = {"variant": name, "shape": [count, vocabulary], "dtype": str(dtype).removeprefix("torch.")}
        try:
            for repetition in range(repetitions + 3):
                leaf = logits[repetition % 2].clone().requires_grad_()
                made: list[tuple[Tensor, Tensor]] = []
                seconds = timed(partial(_keep, made, variant, leaf, target), "cuda")
                loss = made[0][0].sum() + made[0][1].sum()
                back = timed(partial(torch.autograd.grad, loss, leaf), "cuda")
                if repetition > 2:
                    forward.append(seconds)
                    backward.append(back)
            row |= {
                "forward_gbps": size / statistics.median(forward) / 1e9,
                "backward_gbps": 2 * size / statistics.median(backward) / 1e9,
            }
        except Exception as error:
            row["failed"] = _first_line(error)
        results.append(row)
    return results


def _keep(made: list[Any], call: Callable[..., Any], *arguments: Tensor) -> None:
    made.append(call(*arguments))


def measure_small(device: str, repetitions: int) -> list[Row]:
    """Sampling and reductions: microseconds a call."""
    work: dict[str, Callable[[], Any]] = {}
    for batch in (64, 256):
        logits = torch.randn(batch, 151936, device=device) * 3
        uniforms = torch.rand(batch, device=device, dtype=torch.float64)
        for label, top_k, top_p in (("all", 0, 1.0), ("top-k 50, top-p 0.95", 50, 0.95)):
            name = f"{batch} x 151936, {label}"
            work[f"sample: agentropy, {name}"] = partial(sample, logits, uniforms, 1.0, top_k, top_p)
            work[f"sample: sort and multinomial, {name}"] = partial(_sorted_draw, logits, top_k, top_p)
    offsets = torch.linspace(0, 16384, 513, device=device).long()
    reward, value = torch.randn(2, 16384, device=device)
    work["gae: agentropy, 16384 tokens, 512 turns"] = lambda: gae(reward, value, 0.99, 0.95, offsets)
    work["mean: agentropy, 16384 tokens, 512 turns"] = lambda: segment_mean(reward, offsets)
    segment = torch.repeat_interleave(torch.arange(512, device=device), offsets.diff())
    sums = torch.zeros(512, device=device)
    work["mean: index_add (atomic)"] = lambda: sums.index_add(0, segment, reward) / offsets.diff()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 3):
        for name, call in work.items():
            spent = timed(call, device)
            if repetition > 2:
                seconds[name].append(spent)
    return [{"variant": name, "microseconds": 1e6 * statistics.median(each)} for name, each in seconds.items()]


def _sorted_draw(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """The usual filters: a sort per filter, then ``torch.multinomial``."""
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        logits = logits.masked_fill((before >= top_p).scatter(1, order, before >= top_p), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1)


def sweep_tiles(shape: tuple[int, int, int], repetitions: int) -> list[Row]:
    """The fused head on the GPU with other tiles."""
    from ..kernels._triton import linear_logprob as kernels

    problem, head = make_problem(shape, torch.bfloat16, "cuda"), head_variants("cuda")[OURS]
    standard, results = kernels.TILES[2], []
    try:
        for sizes in TILES:
            kernels.TILES[2] = kernels.Tile(*sizes)
            forward, both = [], []
            for repetition in range(repetitions + 1):
                with torch.no_grad():
                    seconds = timed(lambda: head(problem), "cuda")
                total = timed(lambda: head(problem)[0].backward(), "cuda")
                if repetition:
                    forward.append(seconds)
                    both.append(total)
            results.append(
                {
                    "variant": "x".join(map(str, sizes)),
                    "shape": list(shape),
                    "forward_seconds": statistics.median(forward),
                    "seconds": statistics.median(both),
                }
            )
    finally:
        kernels.TILES[2] = standard
    return results


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "spread": ("spread", lambda x: f"{x:.0f}"),
    "forward_seconds": ("forward\nms", lambda x: f"{1e3 * x:,.1f}"),
    "seconds": ("both\nms", lambda x: f"{1e3 * x:,.1f}"),
    "slower": ("ours\nfaster", lambda x: f"{x:.2f}x"),
    "forward_tflops": ("fwd\nTF/s", lambda x: f"{x:.3g}"),
    "extra_bytes": ("extra\nMB", lambda x: f"{x / 1e6:,.0f}"),
    "logprob_error": ("|Δ logp|", lambda x: f"{x:.0e}"),
    "entropy_error": ("|Δ H|", lambda x: f"{x:.0e}"),
    "forward_gbps": ("forward\nGB/s", lambda x: f"{x:,.0f}"),
    "backward_gbps": ("backward\nGB/s", lambda x: f"{x:,.0f}"),
    "microseconds": ("µs", lambda x: f"{x:,.1f}"),
}


def show(console: Console, title: str, rows: list[Row]) -> None:
    """Print one table."""
    table = Table(title=title)
    table.add_column("", min_width=22)
    keys = [key for key in _COLUMNS if any(key in row for row in rows)]
    for key in keys:
        table.add_column(_COLUMNS[key][0], justify="right", no_wrap=True)
    for row in rows:
        cells = ["" if row.get(key) is None else _COLUMNS[key][1](row[key]) for key in keys]
        table.add_row(row["variant"] + (f"\n  {row['failed']}" if "failed" in row else ""), *cells)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 1 when our log-probabilities are off by more than rounding in fp32 explains."""
    parser = argparse.ArgumentParser(prog="agentropy.benchmarks.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one small shape, two repetitions")
    parser.add_argument("--sweep", action="store_true", help="other tiles of the fused head too; with --device cuda")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="wheels to compare with")
    parser.add_argument("--repetitions", type=int, help="by default 3, on a GPU 10")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kernels.json")
    options = parser.parse_args(arguments)
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, but torch sees no GPU; expected --device cpu here")
    repetitions = options.repetitions or (2 if options.quick else 10 if device == "cuda" else 3)
    if repetitions < 1:
        raise UsageError(f"--repetitions {repetitions}; expected at least 1")
    if options.peers is not None:
        if not options.peers.is_dir():
            raise UsageError(f"--peers {options.peers}: no such folder")
        add_peers(options.peers)

    machine = describe_machine(("torch", "triton")) | {"threads": torch.get_num_threads()}
    console = Console()
    console.print(summary(machine) + (f", {machine['gpu']}" if device == "cuda" else f", {machine['threads']} threads"))
    tables: dict[str, list[Row]] = {}

    def add(title: str, rows: list[Row]) -> None:
        tables[title] = rows
        show(console, title, rows)

    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    for shape in QUICK_SHAPES if options.quick else GPU_SHAPES if device == "cuda" else CPU_SHAPES:
        for dtype in dtypes:
            title = "head, {} tokens x {} x {}, ".format(*shape) + str(dtype).removeprefix("torch.")
            add(title, measure_head(shape, dtype, device, repetitions))
        if options.sweep and device == "cuda":
            add("tiles, {} tokens x {} x {}".format(*shape), sweep_tiles(shape, repetitions))
    shape = QUICK_SHAPES[0] if options.quick else (64, 576, 49152) if device == "cpu" else (512, 896, 151936)
    spreads = measure_accuracy(shape, device, min(shape[0], 64 if device == "cpu" else 512))
    add("accuracy in bfloat16 by the standard deviation of the logits", spreads)
    if device == "cuda":
        for vocabulary in (4099,) if options.quick else (151936, 49152):
            for dtype in (torch.bfloat16, torch.float32):
                count = 256 if options.quick else 16384 if dtype == torch.bfloat16 or vocabulary < 1e5 else 8192
                rows = measure_rows(count, vocabulary, dtype, repetitions)
                add(f"rows, {count} x {vocabulary}, {str(dtype).removeprefix('torch.')}", rows)
        add("sampling and reductions", measure_small(device, 5 * repetitions))

    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "device": device, "repetitions": repetitions, "tables": tables}
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(f"written to {options.out}")
    every = (row for rows in tables.values() for row in rows if row["variant"] == OURS)
    return int(any(row.get("logprob_error", 0) > 1e-4 for row in every))


if __name__ == "__main__":
    raise SystemExit(main())
