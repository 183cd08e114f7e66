"""The work items of `bench step`: what is trained, at which shape; and how many FLOP that takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STACKS = ("ours", "hf", "liger", "unsloth")
_OURS, _HF = ("ours",), ("ours", "hf")


@dataclass(frozen=True)
class Work:
    """One optimizer step of full-length random rows.

    Attributes:
        key: how `--rows` names it.
        title: what it is, for the table.
        model: a key of `models.SHAPES`.
        rows, tokens: rows of the step's one micro batch, tokens of each row.
        targets: `attention` (query and value, or the fused projection) or `linear` (every linear layer of the blocks).
        checkpointing: recompute every block in the backward pass.
        level: our `train.activation_checkpointing` where it is not simply `checkpointing`.
        stacks: who can do it at all.
        warmup, steps: steps before the clock runs, and timed ones.
    """

    key: str
    title: str
    model: str
    rows: int = 2
    tokens: int = 1024
    r: int = 8
    targets: str = "attention"
    method: str = "lora"
    quantization: str = "none"
    checkpointing: bool = False
    level: str = ""
    stacks: tuple[str, ...] = STACKS
    warmup: int = 3
    steps: int = 20


_1B: dict[str, Any] = {"model": "llama-3.2-1b", "checkpointing": True, "level": "offload"}
_8B: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "rows": 4,
    "tokens": 2048,
    "r": 16,
    "targets": "linear",
    "checkpointing": True,
    "level": "offload",
    "steps": 6,
}
_GLM: dict[str, Any] = {"model": "chatglm3-6b", "checkpointing": True, "level": "offload", "stacks": _HF, "steps": 10}
_BLOOM: dict[str, Any] = {"model": "bloom-1b4", "stacks": _HF}

WORKS: dict[str, Work] = {
    work.key: work
    for work in (
        Work("1b", "Llama-3.2-1B, LoRA r=8 q,v, bf16, 2x1024", "llama-3.2-1b"),
        Work("1b-ckpt", "same, checkpointing", **_1B),
        Work("1b-ckpt-nf4", "same, nf4 + double quant", quantization="nf4", **_1B),
        Work("1b-ckpt-int8", "same, int8", quantization="int8", **_1B),
        Work("1b-ckpt-fp8", "same, fp8", quantization="fp8", **_1B | {"stacks": _OURS}),
        Work("8b", "Llama-3.1-8B, LoRA r=16 all-linear, 4x2048, checkpointing, bf16", **_8B),
        Work("8b-nf4", "same, nf4 + double quant", quantization="nf4", **_8B),
        Work("8b-int8", "same, int8", quantization="int8", **_8B),
        Work("8b-fp8", "same, fp8 base and arithmetic", quantization="fp8", **_8B | {"stacks": _OURS}),
        Work("8b-48gb", "same, bf16, 48 GB to spend", **_8B | {"checkpointing": False, "level": "", "stacks": _OURS}),
        Work("glm", "ChatGLM3-6B shape (native GLM), LoRA r=8 q,v, 2x1024, checkpointing, bf16", **_GLM),
        Work("glm-int8", "same, int8", quantization="int8", **_GLM),
        Work("bloom", "BLOOM-1b4 shape, LoRA r=8 qkv, bf16, 2x1024", **_BLOOM),
        Work("bloom-bitfit", "same, BitFit", method="bitfit", **_BLOOM),
        Work("qwen3", "Qwen3-1.7B shape, LoRA r=8 q,v, bf16, 2x1024, checkpointing", "qwen3-1.7b", checkpointing=True),
        Work("qwen2.5", "Qwen2.5-1.5B shape, same", "qwen2.5-1.5b", checkpointing=True),
        Work("tiny", "two small blocks, for trying out", "llama-tiny", 2, 64),
    )
}
DEFAULT_ROWS = tuple(key for key in WORKS if key != "tiny")


def block_weights(config: dict[str, Any]) -> int:
    """Weights of all linear layers of the blocks, from a config.json; the output head is not among them."""
    hidden = config["hidden_size"]
    if config["model_type"] == "bloom":
        return int(config["n_layer"]) * 12 * hidden * hidden
    width = config["num_attention_heads"] * _head_dim(config)
    kv_width = config["num_key_value_heads"] * _head_dim(config)
    block = hidden * (2 * width + 2 * kv_width) + 3 * hidden * config["intermediate_size"]
    return int(config["num_hidden_layers"]) * block


def step_flop(config: dict[str, Any], rows: int, tokens: int, recompute: bool = False) -> int:
    """FLOP of one step with frozen weights: forward and input gradients, causal attention, all positions supervised.

    Adapters are not counted: at the ranks measured they are under 2 %.

    Args:
        config: config.json of the model.
        recompute: also count a second forward pass of the blocks.
    """
    weights, head = block_weights(config), config["vocab_size"] * config["hidden_size"]
    layers, width = _layers_and_width(config)
    forward_attention = 2 * rows * tokens * tokens * width * layers
    linear = (6 if recompute else 4) * weights * rows * tokens
    # The backward of attention has five products where the forward has two.
    attention = forward_attention * 7 // 2 + (forward_attention if recompute else 0)
    return linear + 4 * head * rows * tokens + attention


def _layers_and_width(config: dict[str, Any]) -> tuple[int, int]:
    if config["model_type"] == "bloom":
        return config["n_layer"], config["hidden_size"]
    return config["num_hidden_layers"], config["num_attention_heads"] * _head_dim(config)


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
