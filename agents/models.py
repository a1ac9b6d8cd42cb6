"""Language models: small ones from random weights, and any causal model of ``transformers``.

- ``build_small_model``: a Llama of one to five million parameters. ``compose_names``: a start for its embeddings.
- ``load_model``: a model and its tokenizer from a folder or a hub name.
- ``place``: a model on a device.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import UsageError, nearest
from .tokenizer import BOS, END, PAD, SPECIAL_TOKENS

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def build_small_model(
    vocab_size: int,
    *,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int | None = None,
    intermediate: int = 512,
    max_positions: int = 2048,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A Llama with random weights and tied embeddings, in float32 on the CPU.

    The weights depend on ``seed`` and the sizes only, and torch's global generator is left as it was. The
    defaults with 1,000 words make 1.2 M parameters. Special ids are those of ``build_word_tokenizer``.

    Raises:
        UsageError: the sizes do not divide.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if hidden % heads or (hidden // heads) % 2:
        raise UsageError(f"hidden size {hidden} over {heads} heads is not an even whole number per head")
    if heads % kv_heads:
        raise UsageError(f"{heads} heads cannot share {kv_heads} key-value heads; expected a divisor")
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        # The usual 0.02 suits widths of thousands; with it a narrow model's attention starts flat and learns late.
        initializer_range=hidden**-0.5,
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        bos_token_id=SPECIAL_TOKENS.index(BOS),
        eos_token_id=SPECIAL_TOKENS.index(END),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
        if kv_heads == heads:
            _start_by_copying(model)
    model.set_attn_implementation("sdpa")
    return model.eval()


def compose_names(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> None:
    """Let the embedding of a numbered name begin as its noun's plus its number's, in place.

    ``mug 2`` is one word of ``build_word_tokenizer``; so it is near ``mug`` and ``mug 1`` before anything is learned,
    and what is learned of one number holds for the others.
    """
    vocabulary = tokenizer.get_vocab()
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    weight, width = embedding.weight, embedding.embedding_dim
    generator = torch.Generator().manual_seed(seed)
    numbers: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for word, index in sorted(vocabulary.items(), key=lambda item: item[1]):
            noun, space, number = word.rpartition(" ")
            if space and noun in vocabulary:
                if number not in numbers:
                    numbers[number] = torch.randn(width, generator=generator) * width**-0.5
                weight[index] = (weight[vocabulary[noun]] + numbers[number]) * 0.5**0.5


def _start_by_copying(model: LlamaForCausalLM) -> None:
    """Initialise attention such that like attends to like, and what is attended to is written out again.

    After mimetic initialisation (Trockman and Kolter 2023, arXiv 2305.09828), with the signs that suit language:
    query-key products near a multiple of the identity, and value-output products a multiple of it. Copying words of
    the context is most of what an agent's commands need; from ordinary weights it takes several times the updates.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            size = attention.q_proj.weight.shape[0]
            value, _ = torch.linalg.qr(torch.randn(size, size))
            attention.v_proj.weight.copy_(3.0 * value)
            attention.o_proj.weight.copy_(3.0 * value.T)
            shared, _ = torch.linalg.qr(torch.randn(size, size))
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.mul_(0.3).add_(0.7 * shared)


def load_model(
    name: str | os.PathLike[str], *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal model and its tokenizer from a local folder or a hub name such as ``org/model``.

    Raises:
        UsageError: there is no such model, it cannot be downloaded, or it is no causal language model.
    """
    precision = _dtype(dtype)
    source = os.fspath(name)
    folder = Path(source).expanduser()
    local = folder.is_dir()
    if local:
        if not (folder / "config.json").is_file():
            raise UsageError(f"{source} holds no model: expected config.json and weights in that folder")
        source = str(folder)
    elif folder.is_absolute() or source.startswith(("./", "../", "~")) or source.count("/") > 1:
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = nearest(folder.name, siblings) if siblings else ""
        raise UsageError(f"there is no model folder {source}{hint}")
    offline = local or any(os.environ.get(variable, "").upper() in ("1", "TRUE", "YES", "ON") for variable in _OFFLINE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=offline)
        model = AutoModelForCausalLM.from_pretrained(
            source, local_files_only=offline, dtype=precision, attn_implementation="sdpa"
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if local:
            raise UsageError(f"the model in {source} cannot be loaded: {reason}") from error
        state = "and the hub is switched off (HF_HUB_OFFLINE)" if offline else f"and the hub gave none: {reason}"
        raise UsageError(
            f"model '{source}' is neither a folder here nor in the local cache, {state}; "
            f"give a folder, or fetch it with `hf download {source}`"
        ) from error
    return place(model, device).eval(), tokenizer


def place(model: PreTrainedModel, device: str | torch.device) -> PreTrainedModel:
    """Move ``model`` to ``device``, in place, and return it."""
    target: Any = torch.device(device)  # transformers' decorated method loses its signature
    return model.to(target)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in choices:
        raise UsageError(f"unknown dtype '{dtype}'{nearest(dtype, choices)}")
    return choices[dtype]
