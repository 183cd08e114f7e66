"""LoRA (arXiv:2106.09685): PEFT injects the adapters and owns names and file format; we only map settings.

Adapters are fp32 whatever the base, so their optimizer needs no separate master copies.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from fitune.config import LoraConfig, MethodConfig
from fitune.errors import ConfigError
from fitune.methods.base import CONFIG, Method, write_json
from fitune.methods.merging import lora_edits
from fitune.model.families import target_modules
from fitune.model.libraries import import_peft
from fitune.model.load import Base
from fitune.model.quantize import is_quantized


def _apply(base: Base, config: MethodConfig) -> nn.Module:
    assert isinstance(config, LoraConfig)
    peft = import_peft()
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=_whole(config.alpha),
        lora_dropout=config.dropout,
        target_modules=target_modules(base.model, base.model_type, config.target_modules),
        bias="none",
    )
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers by a name that 5.2x calls deprecated: nothing a user could change.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return cast(nn.Module, peft.get_peft_model(base.model, lora, autocast_adapter_dtype=True))


def _whole(alpha: float) -> float:
    """PEFT's files say 16, not 16.0; some readers insist on an integer."""
    return int(alpha) if alpha == int(alpha) else alpha


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = import_peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    return cast(dict[str, torch.Tensor], state)


def _load(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    import_peft().set_peft_model_state_dict(model, tensors)


def _write_config(model: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    config = model.peft_config["default"].to_dict()  # type: ignore[index, union-attr]  # a PeftModel
    config |= {"inference_mode": True, "base_model_name_or_path": facts["base_model"]}
    config["target_modules"] = sorted(config["target_modules"])
    write_json(folder / CONFIG, {key: _plain(value) for key, value in sorted(config.items())})


def _plain(value: Any) -> Any:
    """Enum members and sets as JSON."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)


def _merge(model: nn.Module) -> nn.Module:
    if is_quantized(model):  # PEFT would add to a temporary and drop it
        raise ConfigError(
            "an adapter cannot be merged into quantized weights: the sum would be rounded away. Open the run with "
            "quantization=none, as `fitune export` does"
        )
    return cast(nn.Module, model.merge_and_unload())  # type: ignore[operator]  # a PeftModel


LORA = Method(
    name="lora",
    folder="adapter",
    apply=_apply,
    state=_state,
    load_state=_load,
    write_config=_write_config,
    merge=_merge,
    edits=lora_edits,
)
