"""Generation engines: functions of token ids that share one protocol.

- ``base``: requests, completions and the ``Engine`` protocol; loads no torch.
- ``torch_engine``: the built-in engine, for any causal language model of transformers.
- ``vllm_engine``: vLLM in this process.
- ``http_engine``: any server that speaks OpenAI's interface.
"""

from .base import Completion, Engine, EngineStats, Request, SamplingParams, StopReason, Stream

__all__ = ["Completion", "Engine", "EngineStats", "Request", "SamplingParams", "StopReason", "Stream"]
