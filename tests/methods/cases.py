"""Tiny models of each family, and each method in all its kinds, for the tests of this folder."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from fitune.config import build
from fitune.methods import METHODS
from fitune.methods.base import trainable
from fitune.model.load import Base, load_base
from fitune.model.quantize import QuantLinear
from plan.shapes import TINY
from tiny import make_tokenizer

CPU = torch.device("cpu")
FACTS = {"base_model": "tiny", "base_fingerprint": "abc"}
IDS = torch.tensor([[5, 9, 20, 33, 7, 2], [40, 8, 8, 60, 61, 90]])
FAMILIES = ("llama", "llama tied", "qwen2", "qwen3", "glm", "bloom")

KINDS = {
    "lora": {"name": "lora", "r": 4},
    "lora linear": {"name": "lora", "r": 4, "target_modules": "linear"},
    "rslora": {"name": "lora", "r": 4, "rslora": True},
    "dora": {"name": "lora", "r": 4, "dora": True},
    "pissa": {"name": "lora", "r": 4, "init": "pissa"},
    "olora": {"name": "lora", "r": 4, "init": "olora", "rslora": True},
    "whole head": {"name": "lora", "r": 4, "modules_to_save": ["lm_head"]},
    "full": {"name": "full"},
    "freeze": {"name": "freeze", "num_layers": 1, "also": ["norm"]},
    "freeze patterns": {"name": "freeze", "patterns": ["*norm*"], "also": ["head"]},
    "bitfit": {"name": "bitfit"},
    "prompt": {"name": "prompt", "num_virtual_tokens": 4},
    "prompt text": {"name": "prompt", "num_virtual_tokens": 9, "init": "text", "init_text": "in verse"},
    "ptuning": {"name": "ptuning", "num_virtual_tokens": 4, "encoder_hidden_size": 24},
    "ptuning lstm": {"name": "ptuning", "num_virtual_tokens": 4, "encoder": "lstm", "dropout": 0.2},
    "prefix": {"name": "prefix", "num_virtual_tokens": 4},
    "prefix text": {"name": "prefix", "num_virtual_tokens": 9, "init": "text", "init_text": "in verse"},
    "prefix projection": {"name": "prefix", "num_virtual_tokens": 4, "projection": True, "encoder_hidden_size": 24},
    "ia3": {"name": "ia3"},
    "ia3 linear": {"name": "ia3", "target_modules": "linear"},
}


def make_family(folder: Path, family: str) -> Path:
    """A random 2-layer model of width 64 with a tokenizer, biases that are not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    keys = {key: value for key, value in TINY[family].items() if key != "model_type"}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(TINY[family]["model_type"], **keys | ids))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


def possible(family: str, kind: str) -> bool:
    """Whether a family has what the method trains."""
    return kind != "bitfit" or family in ("qwen2", "glm", "bloom")


def section(kind: str):
    """The configuration of a method."""
    return build({"model": {"path": "m"}, "method": KINDS[kind]}).method


def base(folder: Path, dtype: str = "fp32", quantization: str = "none") -> Base:
    """The frozen model of a folder."""
    return load_base(folder, dtype, CPU, quantization)


def apply(folder: Path, kind: str, dtype: str = "fp32", quantization: str = "none"):
    """The model of a folder with a method applied."""
    torch.manual_seed(0)
    return METHODS[KINDS[kind]["name"]].apply(base(folder, dtype, quantization), section(kind))


def randomize(model, seed: int = 1, scale: float = 0.05) -> None:
    """Move every trainable parameter: as they start, many change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype))


def dequantize(model):
    """Put ordinary layers with the values of the quantized weights into a model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            with torch.no_grad():
                linear.weight.copy_(module.dequantize(torch.float32))
                if module.bias is not None:
                    linear.bias.copy_(module.bias)
            model.set_submodule(name, linear.requires_grad_(False))
    return model


def logits(model) -> torch.Tensor:
    """Of two rows, without those of virtual tokens."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]


def peft_model(folder: Path, adapter: Path):
    """What PEFT itself makes of a base and an adapter folder."""
    import peft
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # PEFT asks transformers
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
