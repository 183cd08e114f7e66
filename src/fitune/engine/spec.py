"""Which models the engine runs: a family is one row of data, not a module.

`block_spec` reads a loaded model and answers with its description, or with the reason why it trains on the plain path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fitune.kernels.attention import MAX_HEAD_DIM
from fitune.kernels.launch import has_triton
from fitune.plan.saves import BlockShape


@dataclass(frozen=True)
class BlockSpec:
    """One decoder block: norm -> attention -> residual -> norm -> gated MLP -> residual.

    Attributes:
        qkv, o, up, down: module names of the projections, grouped by the input they read.
        norm1, norm2: module names of the two RMS norms.
        q_norm, k_norm: module names of per-head norms of queries and keys, "" if there are none.
        interleaved: rotary pairs are (2i, 2i+1) instead of (i, i + half).
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: tuple[str, ...] = ("self_attn.o_proj",)
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: tuple[str, ...] = ("mlp.down_proj",)
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    q_norm: str = ""
    k_norm: str = ""
    interleaved: bool = False

    def names(self) -> dict[str, tuple[str, ...]]:
        """Group name -> module names."""
        return {"qkv": self.qkv, "o": self.o, "up": self.up, "down": self.down}


SPECS: dict[str, BlockSpec] = {
    "llama": BlockSpec(),
    "mistral": BlockSpec(),
    "qwen2": BlockSpec(),
    "qwen3": BlockSpec(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    "glm": BlockSpec(up=("mlp.gate_up_proj",), interleaved=True),
}
ROPE = ("default", "linear", "llama3")  # the frequencies of the others depend on the length of the row


class Unsupported(Exception):
    """Why a model or setting trains on the plain path; its caller knows what to do."""


def base_of(model: nn.Module) -> Any:
    """The transformers model inside PEFT's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def block_spec(model: nn.Module, model_type: str) -> BlockSpec:
    """The description of a model's blocks.

    Raises:
        Unsupported: the reason, in words that can follow "plain path: ".
    """
    spec = SPECS.get(model_type)
    if spec is None:
        raise Unsupported(f"no block description for {model_type!r} models (there is one for {', '.join(SPECS)})")
    config = base_of(model).config
    if config.hidden_act not in ("silu", "swish"):
        raise Unsupported(f"hidden_act {config.hidden_act!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE:
        raise Unsupported(f"rope_type {rope['rope_type']!r}")
    if getattr(config, "attention_dropout", 0.0):
        raise Unsupported("attention_dropout")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise Unsupported("sliding-window attention")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim > MAX_HEAD_DIM:
        raise Unsupported(f"attention heads {head_dim} wide (at most {MAX_HEAD_DIM})")
    if next(model.parameters()).is_cuda and not has_triton():
        raise Unsupported("triton is not installed")
    _check_trainable(model)
    if any(getattr(module, "compute", "") == "llm_int8" for module in model.modules()):
        raise Unsupported("model.int8_compute=llm_int8")
    return spec


def _check_trainable(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if ".lora_A." not in name and ".lora_B." not in name:
            raise Unsupported(f"trains {name}; the engine trains LoRA adapters")
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or not hasattr(module, "base_layer"):
            continue
        if len(module.lora_A) != 1:
            raise Unsupported(f"{len(module.lora_A)} adapters on {name}")
        if len(getattr(module, "lora_magnitude_vector", ())):
            raise Unsupported("DoRA")
        if any(getattr(module, "lora_bias", {}).values()):
            raise Unsupported("adapters with a bias")


def adapter_dropout(model: nn.Module) -> float:
    """The probability with which inputs of adapters are dropped in training.

    Raises:
        Unsupported: adapters differ in it, or drop in another way.
    """
    modules = [m for wrapped in model.modules() for m in getattr(wrapped, "lora_dropout", {}).values()]
    for module in modules:
        if not isinstance(module, nn.Identity | nn.Dropout):
            raise Unsupported(f"{type(module).__name__} on the adapters' input")
    found = {module.p if isinstance(module, nn.Dropout) else 0.0 for module in modules}
    if len(found) > 1:
        raise Unsupported(f"adapters with different dropout: {sorted(found)}")
    return found.pop() if found else 0.0


def block_shape(model: nn.Module, spec: BlockSpec, lora: tuple[int, int, int, int]) -> BlockShape:
    """Sizes of a block, with `lora` adapter columns per group."""
    config = base_of(model).config
    heads = config.num_attention_heads
    return BlockShape(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate=config.intermediate_size,
        qk_norm=bool(spec.q_norm),
        lora=lora,
    )


def rotary_tables(model: nn.Module, positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (positions, rotary_dim / 2) of the model's own rotary embedding, rounded to `dtype` as it does."""
    rotary = base_of(model).model.rotary_emb
    device = rotary.inv_freq.device
    index_1P = torch.arange(positions, device=device)[None]
    with torch.no_grad():
        cos_1PD, sin_1PD = rotary(torch.empty(0, device=device, dtype=dtype), index_1P)
    half = rotary.inv_freq.shape[0]
    return cos_1PD[0, :, :half].contiguous(), sin_1PD[0, :, :half].contiguous()
