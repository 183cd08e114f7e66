"""What an adapter does to each weight of its base, tensor by tensor: merging without a model.

A file of edits is read from an adapter folder as PEFT (or fitune) wrote it. An edit takes a weight in the dtype of the
merged model and returns the new one, with PEFT's operations in PEFT's order: the results are those of
`merge_and_unload`, bit by bit. Variants that need more than one weight at a time, or modules that were trained whole,
have no edits; they are merged in a loaded model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fitune.errors import CheckpointError

Edit = Callable[[torch.Tensor], torch.Tensor]
Edits = dict[str, Edit]  # by the name of a parameter of the transformers model

_PREFIX = "base_model.model."  # of every name in PEFT's files
_NO_BIAS = ("bias", "none")
# Keys of adapter_config.json that do not change how LoRA is merged; any other that is set may be a variant of it.
_PLAIN_LORA = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


def no_edits(adapter: Path) -> Edits | None:
    """For methods that are merged in a loaded model only."""
    return None


def stored_weights(adapter: Path) -> Edits | None:
    """BitFit and the like: the file holds parameters of the model by their own names."""
    return {name: partial(_replace, tensor) for name, tensor in _read(adapter)[1].items()}


def lora_edits(adapter: Path) -> Edits | None:
    """LoRA: W + B A alpha / r, or alpha / √r with rsLoRA; None for its other variants.

    Raises:
        CheckpointError: the adapter is damaged, or its settings are those of another one.
    Memory: the adapter; an edit needs one fp32 copy of its weight and the fp32 product.
    """
    config, tensors = _read(adapter)
    variants = {key for key, value in config.items() if value and key not in _PLAIN_LORA and (key, value) != _NO_BIAS}
    if variants or config.get("init_lora_weights", True) not in (True, False, "gaussian"):  # others change the base
        return None
    if not all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors):
        return None
    r, scale = _rank_and_scale(adapter, config)
    edits: Edits = {}
    for prefix in dict.fromkeys(name.rpartition(".lora_")[0] for name in tensors):
        A_RK, B_NR = (tensors.get(f"{prefix}.lora_{part}.weight", torch.empty(0)) for part in "AB")
        module = prefix.removeprefix(_PREFIX)
        if A_RK.shape[:1] != (r,) or B_NR.shape[1:] != (r,):
            raise CheckpointError(f"{adapter}: does not fit {module}: it has no A and B of rank {r} for it")
        edits[f"{module}.weight"] = partial(_add_product, A_RK, B_NR, scale)
    return edits


def _rank_and_scale(adapter: Path, config: dict[str, Any]) -> tuple[int, float]:
    try:
        r, alpha = config["r"], config["lora_alpha"]
        return r, alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{adapter / 'adapter_config.json'}: r and lora_alpha are no rank and scale ({error!r}); it is damaged"
        ) from error


def ia3_edits(adapter: Path) -> Edits | None:
    """IA3 (arXiv:2205.05638): rows of W and the bias times l, or columns of W in feed-forward layers.

    Bases without that bias never ask for its edit.
    """
    config, tensors = _read(adapter)
    if config.get("modules_to_save") or config.get("fan_in_fan_out"):
        return None
    edits: Edits = {}
    for name, factors in tensors.items():
        if not name.endswith(".ia3_l"):
            return None
        module = name.removeprefix(_PREFIX).removesuffix(".ia3_l")
        edits[f"{module}.weight"] = partial(_multiply, factors)
        if factors.shape[1] == 1:  # of outputs
            edits[f"{module}.bias"] = partial(_multiply, factors.view(-1))
    return edits


def _replace(stored: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return stored.to(weight.dtype)


def _add_product(A_RK: torch.Tensor, B_NR: torch.Tensor, scale: float, weight_NK: torch.Tensor) -> torch.Tensor:
    return (weight_NK + (B_NR @ A_RK) * scale).to(weight_NK.dtype)


def _multiply(factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mul(weight, factors).to(weight.dtype)


def _read(adapter: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    try:
        settings, tensors = dict(json.loads(config.read_text(encoding="utf-8"))), load_file(weights)
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{adapter}: the adapter cannot be read ({error})") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{adapter}: {name} holds values that are not finite: it is damaged, or diverged")
    return settings, tensors
