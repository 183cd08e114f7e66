"""Full fine-tuning: every parameter of the model is trained; the result is a model folder of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitune.config import MethodConfig
from fitune.methods.base import Method, copy_into, trainable
from fitune.model.load import Base


def _apply(base: Base, config: MethodConfig) -> nn.Module:
    return base.model.requires_grad_(True)


def _load(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    copy_into(dict(model.named_parameters()), tensors)


def _write_config(model: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    config = copy.deepcopy(model.config)
    config.use_cache = True  # type: ignore[union-attr]  # off while training; whoever generates wants it
    config.save_pretrained(folder)  # type: ignore[union-attr, operator]  # a transformers model's


FULL = Method(
    name="full",
    folder="model",
    apply=_apply,
    state=lambda model: dict(trainable(model)),
    load_state=_load,
    write_config=_write_config,
    merge=lambda model: model,
    edits=lambda model: {},  # the folder is the merged model
)
