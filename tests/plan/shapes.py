"""Tiny and published configurations that the tests of this folder share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
}
BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
CHATGLM = {
    "hidden_size": 64,
    "inner_hidden_size": 96,
    "num_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "bos_token_id": 124,
    "gmask_token_id": 121,
    "mask_token_id": 120,
    "eos_token_id": 125,
}
# Each family with what changes its parameters.
TINY: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "llama tied": {"model_type": "llama", **SIZES, "tie_word_embeddings": True},
    "llama biases": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    "llama wide heads": {"model_type": "llama", **SIZES, "head_dim": 32},
    "llama one head each": {"model_type": "llama", **SIZES, "num_key_value_heads": None},
    "mistral": {"model_type": "mistral", **SIZES},
    "qwen2": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SIZES},
    "qwen3 biases": {"model_type": "qwen3", **SIZES, "attention_bias": True, "head_dim": 16},
    "glm": {"model_type": "glm", **SIZES, "pad_token_id": 0},
    "glm no bias": {"model_type": "glm", **SIZES, "head_dim": 16, "attention_bias": False, "pad_token_id": 0},
    "bloom": {"model_type": "bloom", **BLOOM},
    "bloom untied": {"model_type": "bloom", **BLOOM, "tie_word_embeddings": False},
    "bloom old names": {
        "model_type": "bloom",
        "n_embed": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    },
    "chatglm": {"model_type": "chatglm", **CHATGLM},
    "chatglm untied": {"model_type": "chatglm", **CHATGLM, "tie_word_embeddings": False},
}


def meta_model(config: dict[str, Any]):
    """The model of a configuration, transformers' or ours, without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fitune.model.bloom import BloomForCausalLM
    from fitune.model.chatglm_v1 import ChatGLMForConditionalGeneration, read_config

    keys = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        if config["model_type"] == "chatglm":
            return ChatGLMForConditionalGeneration(read_config(keys))
        if config["model_type"] == "bloom":
            return BloomForCausalLM(AutoConfig.for_model("bloom", **keys))
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **keys))


def published(shared: Path, name: str) -> dict[str, Any]:
    """config.json of a published model."""
    return json.loads((shared / "configs" / name / "config.json").read_text())


# config.json of published models, as far as it decides parameters: the numbers hold without any file.
LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
LLAMA_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32000,
}
LLAMA_7B = LLAMA_13B | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
BLOOM_1B4 = {"model_type": "bloom", "n_embed": 2048, "n_layer": 24, "num_attention_heads": 16, "vocab_size": 46145}
CHATGLM3 = {
    "model_type": "chatglm",
    "add_qkv_bias": True,
    "ffn_hidden_size": 13696,
    "hidden_size": 4096,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 32,
    "num_layers": 28,
    "padded_vocab_size": 65024,
}
CHATGLM1 = {
    "model_type": "chatglm",
    "hidden_size": 4096,
    "inner_hidden_size": 16384,
    "num_attention_heads": 32,
    "num_layers": 28,
    "vocab_size": 130528,
}
