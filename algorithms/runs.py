"""A run is a folder: configuration, metrics, trajectories, checkpoints, events and a report.

- ``RunFolder``: plans or opens it, appends metrics, stores trees, and cuts back to a checkpoint on resume.
- ``read_rows``: the rows of a metrics file. ``evaluation_path``, ``evaluation_files``: where evaluations are stored.
- ``write_atomically``: a file that is there whole or not at all. ``finite``: a value as JSON knows it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RunConfig, load_config, to_toml
from ..errors import UsageError
from .view.index import index_file, pack, step_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from ..agents.tree import Tree

TIME_PREFIX = "time/"
"""Metrics whose names begin so depend on the machine; all others are equal for equal configurations."""


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, flush it to disk, and rename it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finite(value: Any) -> Any:
    """``value`` with None for every number in it that is not finite, as after an update that was skipped."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; a last line that a kill cut short is skipped."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def evaluation_path(run: Path, step: int, split: str) -> Path:
    """Where a run keeps what came of its evaluation after ``step`` on ``split``."""
    return run / "evaluations" / f"step-{step:06d}-{_file_name(split)}.json"


def evaluation_files(run: Path, split: str) -> list[Path]:
    """Every evaluation of a run on ``split``, in the order of steps."""
    # Other splits may end alike, such as test and hard-test.
    named = re.compile(rf"step-\d+-{re.escape(_file_name(split))}\.json")
    return sorted(path for path in (run / "evaluations").glob("step-*.json") if named.fullmatch(path.name))


def _file_name(split: str) -> str:
    return split.replace("/", "_")


def default_run_dir(config: RunConfig) -> Path:
    """``runs/<time>-<algorithm>-seed<seed>`` under the current folder."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{stamp}-{config.algorithm.name}-seed{config.seed}"


class RunFolder:
    """The files of one run.

    ``metrics.jsonl`` holds one row a line: ``phase`` (``sft``, ``eval``, ``eval/<split>`` of further splits,
    ``train``), ``step``, and numbers.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self.path = path
        self.config = config
        self._writer: SummaryWriter | None = None

    @classmethod
    def plan(cls, config: RunConfig) -> RunFolder:
        """Choose the folder of a new run; nothing is written before ``make``.

        Raises:
            UsageError: the folder already holds a run.
        """
        path = Path(config.run_dir) if config.run_dir else default_run_dir(config)
        if (path / "config.toml").exists():
            raise UsageError(
                f"'{path}' already holds a run; continue it with `agentropy train --resume {path}` "
                "or choose another --run-dir"
            )
        return cls(path, config)

    def make(self) -> None:
        """Create what is missing of the folder; the configuration of an existing run stays as it is."""
        for part in ("checkpoints", "evaluations", "trajectories"):
            (self.path / part).mkdir(parents=True, exist_ok=True)
        if not (self.path / "config.toml").exists():
            write_atomically(self.path / "config.toml", to_toml(self.config).encode())

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run.

        Raises:
            UsageError: the folder holds no run.
        """
        folder = Path(path)
        if not (folder / "config.toml").is_file():
            raise UsageError(f"'{folder}' holds no run: it has no config.toml")
        return cls(folder, load_config(folder / "config.toml"))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def rows(self) -> Iterator[dict[str, Any]]:
        """All metric rows; a last line that a kill cut short is skipped."""
        if self.metrics_file.exists():
            yield from read_rows(self.metrics_file)

    def log(self, phase: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Append a row and mirror its numbers to TensorBoard; what is not finite is told as None."""
        metrics = finite(metrics)
        row = {"phase": phase, "step": step, **metrics}
        with open(self.metrics_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        writer = self._tensorboard()
        for name, value in metrics.items():
            if isinstance(value, int | float):
                writer.add_scalar(f"{phase}/{name}", value, step)

    def rewind(self, rows: int) -> None:
        """Keep the first ``rows`` metric rows, which the checkpoint had seen, and what was saved of their steps."""
        kept = list(islice(self.rows(), rows))
        write_atomically(self.metrics_file, "".join(json.dumps(row) + "\n" for row in kept).encode())
        # Event files cannot be cut; they are written anew from the rows that remain.
        shutil.rmtree(self.path / "events", ignore_errors=True)
        writer = self._tensorboard()
        for row in kept:
            for name, value in row.items():
                if isinstance(value, int | float) and name != "step":
                    writer.add_scalar(f"{row['phase']}/{name}", value, row["step"])
        done = max((row["step"] for row in kept if row["phase"] == "train"), default=0)
        for part in ("evaluations", "trajectories"):
            for path in (self.path / part).glob("step-*"):
                number = re.match(r"step-(\d+)[-.]", path.name)
                if number and int(number[1]) > done:
                    path.unlink()

    def save_trees(self, step: int, trees: Iterable[Tree]) -> None:
        """Store a step's rollouts, one tree a line, and beside them their index."""
        path = step_file(self.path, step)
        data, index = pack(tree.to_dict() for tree in trees)
        # At no moment does an index lie beside other trees than its own.
        index_file(path).unlink(missing_ok=True)
        write_atomically(path, data)
        write_atomically(index_file(path), index)

    def save_outcomes(self, step: int, split: str, outcomes: Mapping[str, Any]) -> None:
        """Store what came of every episode of an evaluation, as JSON."""
        path = evaluation_path(self.path, step, split)
        write_atomically(path, json.dumps({"step": step, "split": split, **outcomes}, separators=(",", ":")).encode())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _tensorboard(self) -> SummaryWriter:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path / "events"))
        return self._writer
