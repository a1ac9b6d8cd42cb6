"""Starting and stopping vLLM inside another program's process, and what its reload leaves undone.

- ``import_vllm``: the package, with the settings that it reads when it is imported.
- ``quiet_start``: its ``LLM``; ``shut_down``: the end of one.
- ``save``: a module as a folder; ``checkpoint``: names and shapes of a folder's weights; ``check_fit``: whether others
  are the same; ``detached``, ``dtype_name``: weights and types as vLLM takes them.
- ``repack_tied_heads``: what has to follow every reload on a CPU; ``wipe_cache``: what has to follow numbers that
  are not finite.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from ...errors import MissingDependencyError, UsageError, nearest

FINEST_TEMPERATURE = 0.01
"""vLLM raises temperatures between 0 and this one to it."""
_INSTALL = (
    "install it in an environment of its own: `make vllm` for CPUs, `pip install 'agentropy[vllm]'` for an NVIDIA GPU"
)
_SETTINGS = {
    # The engine in this process: weights are handed over by reference, and no process outlives it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # The newer runner takes no logits processors.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_DTYPES = {"float32", "bfloat16", "float16"}
_open = False
"""Whether an engine is open; the end of one takes down what all of a process share."""


def import_vllm() -> Any:
    """Import vLLM, with what it reads from the environment set where that is unset.

    Raises:
        MissingDependencyError: it is not installed, or its import fails.
        UsageError: the environment asks for an engine in another process.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MissingDependencyError(f"the vllm engine needs vLLM, which is not installed; {_INSTALL}")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        raise UsageError(
            "VLLM_ENABLE_V1_MULTIPROCESSING is "
            f"{os.environ['VLLM_ENABLE_V1_MULTIPROCESSING']!r}, but weights are handed over within one process; "
            "expected it unset or 0"
        )
    try:
        vllm = importlib.import_module("vllm")
        platform = importlib.import_module("vllm.platforms").current_platform
        if platform.is_cpu():
            # It would compile one comparison, for ranks of tokens that nobody reads, for some 18 seconds.
            type(platform).simple_compile_backend = "eager"
        return vllm
    except (ImportError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MissingDependencyError(
            f"vLLM is installed but cannot be imported ({reason}); on a CPU try "
            f"`pip uninstall torchvision torchaudio torchcodec`, or {_INSTALL}"
        ) from error


def quiet_start(source: str, options: dict[str, Any]) -> Any:
    """``vllm.LLM`` of a folder or hub name, leaving torch's settings in this process as they were.

    Raises:
        UsageError: vLLM cannot run the model so, or it may not have this process for itself.
    """
    global _open
    vllm = importlib.import_module("vllm")
    if _open:
        raise UsageError("this process runs a VLLMEngine already, and vLLM has room for one; close() that one first")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UsageError(
            "this process belongs to a torch.distributed group, which vLLM would take for its own; "
            "expected a process without one, or a vLLM server and the http engine"
        )
    options = dict(options)
    length = options["max_model_len"]
    if length is None:
        config = AutoConfig.from_pretrained(source)
        length = getattr(config, "max_position_embeddings", None) or options["max_num_batched_tokens"]
    # Without pieces a prompt has to fit into one pass.
    options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], length)
    threads, random_state = torch.set_num_threads, torch.get_rng_state()
    try:
        llm = vllm.LLM(model=source, **options)
    except (ValueError, OSError, RuntimeError, NotImplementedError, AssertionError) as error:
        importlib.import_module("vllm.distributed.parallel_state").cleanup_dist_env_and_memory()
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"vLLM cannot run {source}: {reason}") from error
    finally:
        # On a CPU it replaces the function by one that does nothing, for the whole process.
        torch.set_num_threads = threads
        torch.set_rng_state(random_state)
    _open = True
    return llm


def shut_down(llm: Any) -> None:
    """Free weights, cache and the process group of ``quiet_start``'s object."""
    global _open
    llm.llm_engine.engine_core.shutdown()
    with contextlib.suppress(ImportError, AttributeError):
        # What a reload notes of every layer keeps the layers themselves alive.
        importlib.import_module("vllm.model_executor.model_loader.reload.layerwise").LAYERWISE_INFO.clear()
    _open = False


def save(module: PreTrainedModel, folder: str) -> None:
    """Write configuration and weights, quietly."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        module.save_pretrained(folder)
    finally:
        if shown:
            logging.enable_progress_bar()


def checkpoint(folder: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a folder's safetensors files; empty where it has none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
    return shapes


def check_fit(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], tied: bool) -> None:
    """Compare names and shapes with those of the checkpoint that vLLM started from; ``shapes`` is empty without one.

    Raises:
        UsageError: a name is missing or unknown, or a shape differs.
    """
    optional = {"lm_head.weight"} if tied else set()
    if not shapes:
        return
    for name, shape in shapes.items():
        if name not in state and name not in optional:
            raise UsageError(f"the weights do not fit the model: '{name}' is missing; expected the names it has")
        if name in state and tuple(state[name].shape) != shape:
            raise UsageError(
                f"the weights do not fit the model: '{name}' has shape {tuple(state[name].shape)}; expected {shape}"
            )
    for name in state:
        if name not in shapes and name not in optional:
            raise UsageError(f"the weights do not fit the model: '{name}' is unknown{nearest(name, shapes)}")


def detached(state: Mapping[str, Any], tied: bool) -> Iterator[tuple[str, Tensor]]:
    """A state dict as vLLM reads it, without a tied head."""
    for name, tensor in state.items():
        if not (tied and name == "lm_head.weight"):
            yield name, tensor.detach()


def dtype_name(dtype: str | torch.dtype | None, module: PreTrainedModel | None) -> str:
    """The name that vLLM knows a type by."""
    if dtype is None:
        return "auto" if module is None else str(next(module.parameters()).dtype).removeprefix("torch.")
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise UsageError(f"unknown dtype '{name}'{nearest(name, _DTYPES)}")
    return name


def repack_tied_heads(model: nn.Module) -> None:
    """Let output heads that share the embedding's weights use the new ones.

    On a CPU vLLM multiplies with a repacked copy of a head's weights, and its reload forgets that of a tied head.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def wipe_cache(worker: Any) -> None:
    """Write zeros over all keys and values: places that are masked out count as 0 x NaN otherwise."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()
