"""Which models the engine runs: a family is one row of data, not a module.

`block_spec` reads a loaded model and answers with its description, or with the reason why it trains on the plain path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fitune.kernels.attention import MAX_HEAD_DIM
from fitune.kernels.launch import has_triton
from fitune.kernels.norm import MAX_WIDTH, Norm
from fitune.model import prefix_lm
from fitune.plan.saves import BlockShape


@dataclass(frozen=True)
class BlockSpec:
    """One decoder block: norm -> attention -> residual -> norm -> MLP -> residual, and what stands around all blocks.

    Attributes:
        qkv, o, up, down: module names of the projections within a block, grouped by the input they read.
        norm1, norm2: module names of the two norms.
        q_norm, k_norm: module names of per-head norms of queries and keys, "" if there are none.
        layers, final_norm: where the list of blocks and the last norm stand in the model.
        embedding_norm: the norm behind the embedding, "" if there is none.
        norm: all norms but those of heads: RMS norms, or layer norms with a bias.
        positions: rotary, one or two axes of it; or ALiBi.
        interleaved: rotary pairs are (2i, 2i+1) instead of (i, i + half).
        fused: rows of the one projection to queries, keys and values are [q | k | v] of one head after another.
        mlp: silu(gate) * up, or gelu (its tanh form).
        carried: the residual stream passes through the two norms, times this; None: beside them. See `kernels.norm`.
        prefix: what stands before a document's answer is seen by all of it (`model.prefix_lm`).
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    o: tuple[str, ...] = ("self_attn.o_proj",)
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: tuple[str, ...] = ("mlp.down_proj",)
    norm1: str = "input_layernorm"
    norm2: str = "post_attention_layernorm"
    q_norm: str = ""
    k_norm: str = ""
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    embedding_norm: str = ""
    norm: Literal["rms", "layer"] = "rms"
    positions: Literal["rotary", "rotary of two axes", "alibi"] = "rotary"
    interleaved: bool = False
    fused: bool = False
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    carried: float | None = None
    prefix: bool = False

    def names(self) -> dict[str, tuple[str, ...]]:
        """Group name -> module names."""
        return {"qkv": self.qkv, "o": self.o, "up": self.up, "down": self.down}


SPECS: dict[str, BlockSpec] = {
    "llama": BlockSpec(),
    "mistral": BlockSpec(),
    "qwen2": BlockSpec(),
    "qwen3": BlockSpec(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    "glm": BlockSpec(up=("mlp.gate_up_proj",), interleaved=True),
    "bloom": BlockSpec(
        qkv=("self_attention.query_key_value",),
        o=("self_attention.dense",),
        up=("mlp.dense_h_to_4h",),
        down=("mlp.dense_4h_to_h",),
        layers="transformer.h",
        final_norm="transformer.ln_f",
        embedding_norm="transformer.word_embeddings_layernorm",
        norm="layer",
        positions="alibi",
        fused=True,
        mlp="gelu",
    ),
    "chatglm": BlockSpec(  # the first version; 2 and 3 are glm
        qkv=("attention.query_key_value",),
        o=("attention.dense",),
        up=("mlp.dense_h_to_4h",),
        down=("mlp.dense_4h_to_h",),
        layers="transformer.layers",
        final_norm="transformer.final_layernorm",
        norm="layer",
        positions="rotary of two axes",
        fused=True,
        mlp="gelu",
        carried=math.sqrt(2 * 28),  # however many layers there are
        prefix=True,
    ),
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
    if spec.mlp == "swiglu" and config.hidden_act not in ("silu", "swish"):
        raise Unsupported(f"hidden_act {config.hidden_act!r}")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPE:
        raise Unsupported(f"rope_type {rope['rope_type']!r}")
    for name in ("attention_dropout", "hidden_dropout", "apply_residual_connection_post_layernorm"):
        if getattr(config, name, False):
            raise Unsupported(name)
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise Unsupported("sliding-window attention")
    head_dim = _head_dim(config)
    if head_dim > MAX_HEAD_DIM:
        raise Unsupported(f"attention heads {head_dim} wide (at most {MAX_HEAD_DIM})")
    if config.hidden_size > MAX_WIDTH:
        raise Unsupported(f"norms of rows {config.hidden_size} wide (at most {MAX_WIDTH})")
    if next(model.parameters()).is_cuda and not has_triton():
        raise Unsupported("triton is not installed")
    _check_adapters(model)
    if any(getattr(module, "compute", "") == "llm_int8" for module in model.modules()):
        raise Unsupported("model.int8_compute=llm_int8")
    return spec


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _check_adapters(model: nn.Module) -> None:
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
    down: Any = base_of(model).get_submodule(spec.layers)[0].get_submodule(spec.down[0])
    return BlockShape(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=_head_dim(config),
        intermediate=getattr(down, "base_layer", down).in_features,
        gated=spec.mlp == "swiglu",
        qk_norm=bool(spec.q_norm),
        layer_norm=spec.norm == "layer",
        axes=2 if spec.positions == "rotary of two axes" else 1,
        prefix=spec.prefix,
        lora=lora,
    )


def frozen_norm(module: Any) -> Norm:
    """What the kernels read of a norm module; the tensors are the module's own."""
    bias = getattr(module, "bias", None)
    return Norm(module.weight.detach(), None if bias is None else bias.detach(), epsilon(module))


def epsilon(norm: Any) -> float:
    """What a norm adds to the variance: PyTorch's layer norms and transformers' RMS norms name it differently."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


def rotary_tables(
    model: nn.Module, spec: BlockSpec, positions: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos, sin (positions, pairs of one axis) of the model's own rotary embedding, rounded to `dtype` as it does."""
    base = base_of(model)
    if spec.positions == "rotary of two axes":
        rows_12P = torch.arange(positions, device=next(base.parameters()).device).expand(1, 2, positions)
        cos, sin = prefix_lm.rotary_tables(rows_12P, _head_dim(base.config), dtype)
        return cos[0, 0, :, 0].contiguous(), sin[0, 0, :, 0].contiguous()
    rotary = base.model.rotary_emb
    device = rotary.inv_freq.device
    index_1P = torch.arange(positions, device=device)[None]
    with torch.no_grad():
        cos_1PD, sin_1PD = rotary(torch.empty(0, device=device, dtype=dtype), index_1P)
    half = rotary.inv_freq.shape[0]
    return cos_1PD[0, :, :half].contiguous(), sin_1PD[0, :, :half].contiguous()


def alibi_slopes(heads: int, device: torch.device) -> torch.Tensor:
    """(heads,) fp32: those of the model's own bias."""
    from fitune.model.bloom import alibi_slopes  # imports transformers' model code

    return torch.tensor(alibi_slopes(heads), dtype=torch.float32, device=device)
