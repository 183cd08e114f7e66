"""Random-weight models of real shapes: speed and memory do not depend on the values.

Written once into a folder and found there again; made on the GPU if there is one.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

_LLAMA: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_QWEN: dict[str, Any] = {
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}

# name -> (configuration class, its arguments)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": (
        "LlamaConfig",
        {
            **_LLAMA,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "intermediate_size": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            **_LLAMA,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "head_dim": 128,
            "intermediate_size": 14336,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3-1.7b": (
        "Qwen3Config",
        {
            **_QWEN,
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
        },
    ),
    "qwen2.5-1.5b": (
        "Qwen2Config",
        {
            **_QWEN,
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "max_position_embeddings": 131072,
        },
    ),
    "bloom-1b4": ("BloomConfig", {"hidden_size": 2048, "n_layer": 24, "n_head": 16, "vocab_size": 46145}),
    "chatglm3-6b": (
        "GlmConfig",
        {
            "vocab_size": 65024,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 28,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "chatglm-6b": ("ChatGLMConfig", {}),
    "llama-tiny": (
        "LlamaConfig",
        {
            "hidden_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 512,
            "vocab_size": 1024,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
    ),
}


def model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def make(name: str, models: Path) -> Path:
    """Write a model unless it is there already; returns its folder.

    The folder appears by rename, so a model half written is never taken for one. Needs torch: call it in a child, or
    the caller keeps a CUDA context.

    Raises:
        KeyError: `name` is not in `SHAPES`.
    """
    folder = models / name
    if folder.is_dir():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{name}.part", dir=models))
    _random_model(name).save_pretrained(part, max_shard_size="4GB")
    _made_up_tokenizer(part)
    part.chmod(0o755)  # mkdtemp makes it private
    part.rename(folder)
    return folder


def with_tokenizer(folder: Path, tokenizer: Path) -> Path:
    """A model folder beside `folder` with the same weights and a real tokenizer; its weights are links.

    Args:
        tokenizer: a folder with tokenizer.json (or .json.gz) and tokenizer_config.json.

    Raises:
        ValueError: the tokenizer's vocabulary is not the model's.
    """
    import tokenizers

    target = folder.with_name(f"{folder.name}+{tokenizer.name}")
    if target.is_dir():
        return target
    plain, packed = tokenizer / "tokenizer.json", tokenizer / "tokenizer.json.gz"
    text = plain.read_text("utf-8") if plain.is_file() else gzip.decompress(packed.read_bytes()).decode("utf-8")
    entries = tokenizers.Tokenizer.from_str(text).get_vocab_size(with_added_tokens=True)
    rows = model_config(folder)["vocab_size"]
    if entries != rows:
        raise ValueError(f"{tokenizer} has {entries} entries, {folder.name} has {rows} embedding rows; give its own")
    part = Path(tempfile.mkdtemp(prefix=f"{target.name}.part", dir=folder.parent))
    for file in folder.iterdir():
        if not file.name.startswith(("tokenizer", "special_tokens")):
            os.link(file, part / file.name)
    (part / "tokenizer.json").write_text(text, encoding="utf-8")
    shutil.copyfile(tokenizer / "tokenizer_config.json", part / "tokenizer_config.json")
    part.chmod(0o755)
    part.rename(target)
    return target


def _random_model(name: str) -> Any:
    import torch
    import transformers

    kind, arguments = SHAPES[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device("meta"):
        if kind == "ChatGLMConfig":
            from fitune.model.chatglm_v1 import ChatGLMConfig, ChatGLMForConditionalGeneration

            model = ChatGLMForConditionalGeneration(ChatGLMConfig(**arguments)).to(torch.bfloat16)
        else:
            config = getattr(transformers, kind)(**arguments)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
            elif parameter_name.endswith("bias"):
                parameter.zero_()
            else:
                parameter.fill_(1)  # the weights of norms
        model.tie_weights()
    return model


def _made_up_tokenizer(folder: Path) -> None:
    """Enough of a tokenizer for stacks that insist on one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<bos>": 0, "<eos>": 1, "<unk>": 2, **{f"t{i}": i for i in range(3, 1000)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
