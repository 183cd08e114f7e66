"""A model without some of its weights: transformers builds and fills it, and stand-ins without memory take their place.

transformers knows how names in files become names of modules, what is tied and which buffers are computed. It is given
every tensor it shall load, and for the others one element seen as a whole matrix. Which module got which is known by
the memory they share.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fitune.errors import ConfigError
from fitune.model.bitsandbytes_format import StoredWeight, read_stored, stored_weights
from fitune.model.quantize import QuantLinear
from fitune.model.weights import WeightFiles


def load_around(
    model_class: Any,
    options: dict[str, Any],
    weights: WeightFiles,
    absent: dict[str, torch.Size],
    left_out: Iterable[str],
) -> tuple[nn.Module, dict[str, Any], dict[str, str]]:
    """Load a model on CPU, with stand-ins for some weights.

    Args:
        model_class: a causal model class of transformers.
        options: arguments of its `from_pretrained`; `dtype` is a torch dtype.
        absent: shapes of the weights that are not read, by their names in the files.
        left_out: names in the files that are no parameters of the model.
    Returns:
        the model, transformers' loading report, and for each parameter that is a stand-in the name in the files.
    Raises:
        AssertionError: transformers copied a stand-in, which would be a whole weight.
    Memory: the tensors that are read.
    """
    dtype = options["dtype"]
    skipped = {*absent, *left_out}
    state = {name: weights.read(name) for name in weights.shapes if name not in skipped}
    names = {}
    for name, shape in absent.items():
        element = torch.zeros(1, dtype=dtype)
        names[element.data_ptr()] = name
        state[name] = element.expand(shape)
    model, report = model_class.from_pretrained(None, state_dict=state, output_loading_info=True, **options)
    found = {path: names[p.data_ptr()] for path, p in model.named_parameters() if p.data_ptr() in names}
    if not report.get("mismatched_keys"):  # those are made anew, and refused by the caller
        copied = absent.keys() - set(found.values()) - set(report.get("unexpected_keys") or ())
        assert not copied, f"stand-ins were copied: {sorted(copied)[:3]}"
    return model, report, found


def load_stored(
    model_class: Any, options: dict[str, Any], folder: Path, weights: WeightFiles, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model that bitsandbytes quantized: its linear layers become `QuantLinear` on `device`, the rest is on CPU.

    Raises:
        ConfigError: no weight is stored so, or one that is no linear layer of a block.
    Memory: on `device` the result; on the host what is not quantized, and pages of the weight files.
    """
    stored = stored_weights(weights)
    if not stored:
        raise ConfigError(
            f"{folder}: config.json says that bitsandbytes quantized the weights, but none is stored so; remove "
            "quantization_config from config.json if these are the 16-bit weights"
        )
    shapes = {name: one.shape for name, one in stored.items()}
    companions = [name for one in stored.values() for name in one.companions]
    model, report, found = load_around(model_class, options, weights, shapes, companions)
    if report.get("mismatched_keys"):
        return model, report
    unplaced = sorted(stored.keys() - set(found.values()))
    if unplaced:
        raise ConfigError(f"{folder}: {unplaced[0]} is quantized, but no weight of a {type(model).__name__}")
    for path, name in found.items():
        _place(model, path, stored[name], weights, device)
    return model, report


def _place(model: nn.Module, path: str, stored: StoredWeight, weights: WeightFiles, device: torch.device) -> None:
    layer = path.removesuffix(".weight")
    linear: Any = model.get_submodule(layer)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if type(linear) is not nn.Linear or linear is head or tuple(linear.weight.shape) != tuple(stored.shape):
        raise ConfigError(
            f"{stored.name} is quantized, but {layer} is no linear layer of a block; fitune quantizes those alone. "
            f"Quantize the model again with llm_int8_skip_modules=[{layer.rsplit('.', 1)[-1]!r}]"
        )
    buffers = {name: tensor.to(device) for name, tensor in read_stored(weights, stored).items()}
    bias = None if linear.bias is None else linear.bias.detach().to(device)
    quantized = QuantLinear.stored(buffers, stored.shape, bias, stored.quantization, linear.weight.dtype)
    model.set_submodule(layer, quantized)
