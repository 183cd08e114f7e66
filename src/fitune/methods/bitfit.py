"""BitFit (arXiv:2106.10199): only the bias vectors are trained.

PEFT has no such method, so the file format is ours in PEFT's clothes: `adapter_model.safetensors` with the model's
own parameter names, and an `adapter_config.json` whose `peft_type` is BITFIT.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitune.config import MethodConfig
from fitune.errors import ConfigError
from fitune.methods.base import CONFIG, Method, copy_into, trainable, write_json
from fitune.methods.merging import stored_weights
from fitune.model.load import Base


def _apply(base: Base, config: MethodConfig) -> nn.Module:
    biases = [p for name, p in base.model.named_parameters() if name.endswith("bias")]
    if not biases:
        raise ConfigError(
            f"method.name=bitfit trains biases, but this {base.model_type} model has none; use method.name=lora"
        )
    for bias in biases:
        bias.requires_grad_(True)
    return base.model


def _load(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    copy_into(dict(model.named_parameters()), tensors)


def _write_config(model: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    write_json(
        folder / CONFIG,
        {
            "peft_type": "BITFIT",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": facts["base_model"],
        },
    )


BITFIT = Method(
    name="bitfit",
    folder="adapter",
    apply=_apply,
    state=lambda model: dict(trainable(model)),
    load_state=_load,
    write_config=_write_config,
    merge=lambda model: model,  # the biases already stand in the model
    edits=stored_weights,
)
