"""Methods that train the model's own parameters: all of them, those of some blocks, or the biases.

PEFT has none of them. The file of the partial ones is ours in PEFT's clothes: `adapter_model.safetensors` holds the
trained tensors by the model's own names, and `adapter_config.json` has a `peft_type` that PEFT does not know.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from fitune.config import FreezeConfig, MethodConfig
from fitune.errors import ConfigError
from fitune.methods.base import (
    CONFIG,
    WEIGHTS,
    Method,
    Tensors,
    check_tensors,
    copy_into,
    read_tensors,
    trainable,
    write_json,
)
from fitune.methods.merging import stored_weights
from fitune.model.families import blocks, parameters_like
from fitune.model.load import Base


def _full(base: Base, config: MethodConfig) -> nn.Module:
    return base.model.requires_grad_(True)


def _bitfit(base: Base, config: MethodConfig) -> nn.Module:
    biases = [name for name, _ in base.model.named_parameters() if name.endswith("bias")]
    if not biases:
        raise ConfigError(
            f"method.name=bitfit trains biases, but this {base.model_type} model has none; use method.name=lora"
        )
    return _train(base.model, biases)


def _freeze(base: Base, config: MethodConfig) -> nn.Module:
    assert isinstance(config, FreezeConfig)
    names = [name for pattern in config.patterns for name in parameters_like(base.model, pattern)]
    path, count = blocks(base.model)
    wanted = config.num_blocks
    if wanted > count:
        raise ConfigError(
            f"method.num_layers is {wanted}, but this {base.model_type} model has {count} blocks; set "
            f"method.num_layers={count} or less"
        )
    inside = tuple(f"{path}.{number}." for number in range(count - wanted, count))
    names += [name for name, _ in base.model.named_parameters() if name.startswith(inside)]
    names += [name for part in config.also for name in _outside(base, f"{path}.", part)]
    return _train(base.model, names)


def _outside(base: Base, path: str, part: str) -> list[str]:
    """Names of the parameters of one part outside the blocks; those of a tied head are the embedding's."""
    model: Any = base.model
    modules = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    found = (
        {id(parameter) for parameter in modules[part].parameters()}
        if part in modules
        else {
            id(parameter)
            for name, module in base.model.named_modules()
            if "norm" in type(module).__name__.lower() and not name.startswith(path)
            for parameter in module.parameters(recurse=False)
        }
    )
    return [name for name, parameter in base.model.named_parameters() if id(parameter) in found]


def _train(model: nn.Module, names: list[str]) -> nn.Module:
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    return model


def _load(model: nn.Module, tensors: Tensors) -> None:
    copy_into(dict(model.named_parameters()), tensors)


def _open(base: Base, folder: Path) -> nn.Module:
    tensors, named = read_tensors(folder / WEIGHTS), dict(base.model.named_parameters())
    check_tensors(folder / WEIGHTS, tensors, {name: named[name] for name in tensors if name in named})
    _load(base.model, tensors)
    return base.model


def _write_model_config(model: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
    config = copy.deepcopy(model.config)
    config.use_cache = True  # type: ignore[union-attr]  # off while training; whoever generates wants it
    config.save_pretrained(folder)  # type: ignore[union-attr, operator]  # a transformers model's


def _partial(name: str, apply: Any) -> Method:
    def write_config(model: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        kind = {"peft_type": name.upper(), "task_type": "CAUSAL_LM"}
        write_json(folder / CONFIG, {**kind, "base_model_name_or_path": facts["base_model"]})

    return Method(
        name=name,
        folder="adapter",
        apply=apply,
        state=lambda model: dict(trainable(model)),
        load_state=_load,
        write_config=write_config,
        open=_open,
        merge=lambda model: model,  # what was trained already stands in the model
        edits=stored_weights,
    )


FULL = Method(
    name="full",
    folder="model",
    apply=_full,
    state=lambda model: dict(trainable(model)),
    load_state=_load,
    write_config=_write_model_config,
    open=lambda base, folder: base.model,  # the result is a base
    merge=lambda model: model,
    edits=lambda folder: {},
)
FREEZE = _partial("freeze", _freeze)
BITFIT = _partial("bitfit", _bitfit)
