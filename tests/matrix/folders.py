"""A tiny random model folder of each family of the matrix: two blocks, a vocabulary and a tokenizer made in code.

GLM is a folder as ChatGLM3 was published, ChatGLM-6B one as the first version was: code of their own beside the
weights, original names, SentencePiece.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import original_chatglm as chatglm3
import original_chatglm_v1 as chatglm1
from plan.shapes import TINY
from tiny import make_tokenizer

# The pieces of ChatGLM-6B's vocabulary that the layout needs, at ids of our own.
CONTROL, USER_DEFINED = 3, 4
SPECIAL = [(text, 0.0, CONTROL) for text in ("<pad>", "[MASK]", "[gMASK]", "<sop>", "<eop>", "<dBLOCK>")]
MARKS = ["<n>", "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81))]
VOCABULARY = 512
FIRST_SPECIAL = 3 + 256 + len(chatglm3.WORDS)  # <unk>, <s>, </s>, bytes, words
IDS = dict(zip(("pad", "mask", "gmask", "bos", "eos"), range(FIRST_SPECIAL, FIRST_SPECIAL + 5), strict=True))
CHATGLM1 = chatglm1.SIZES | {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "inner_hidden_size": 64,
    "num_attention_heads": 2,
    "num_layers": 2,
    "tie_word_embeddings": True,
    **{f"{name}_token_id": number for name, number in IDS.items()},
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": TINY["llama"] | ENDS,
    "qwen3": TINY["qwen3"] | ENDS | {"head_dim": 32, "tie_word_embeddings": True},
    "bloom": TINY["bloom"] | ENDS,
    "glm": chatglm3.CONFIG | {"seq_length": 128},
    "chatglm v1": CHATGLM1 | {"max_sequence_length": 128},
}


def make_folder(folder: Path, family: str) -> Path:
    """Configuration, tokenizer and weights of a family; weights and biases are large enough to matter."""
    folder.mkdir(parents=True)
    maker: Callable[[Path, dict[str, Any]], None] = {"glm": _chatglm3, "chatglm v1": _chatglm1}.get(family, _stock)
    maker(folder, CONFIGS[family])
    return folder


def _stock(folder: Path, config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(folder)
    keys = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **keys))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
            elif parameter.dim() == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)


def _chatglm3(folder: Path, config: dict[str, Any]) -> None:
    chatglm3.write_folder(folder, **config)


def _chatglm1(folder: Path, config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('code of the model folder was run')\n")
    marks = [(text, 0.0, USER_DEFINED) for text in MARKS]
    unigram = chatglm3.sentencepiece_file(trainer={3: 1, 35: 1}, extra=[*SPECIAL, *marks])
    (folder / "ice_text.model").write_bytes(unigram)
    names = {"bos_token": "<sop>", "eos_token": "<eop>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"num_image_tokens": 0}))
    weights = chatglm1.random_weights(config)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    save_file(weights, folder / "model.safetensors")
