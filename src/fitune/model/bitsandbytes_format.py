"""How bitsandbytes' quantized weights stand in safetensors files: read and written without bitsandbytes.

A weight `w` of N x K in 8 bits is `w` (N, K) int8, `SCB` (N,) fp32 beside it, and `weight_format`, which is 0 for rows.
In 4 bits it is `w`, packed, in bytes or viewed as another dtype; `w.quant_map`, the values of the codes; `w.absmax`;
and `w.quant_state.bitsandbytes__nf4` (or fp4), which is JSON. With double quantization `w.absmax` is in 8 bits, with
`w.nested_absmax`, `w.nested_quant_map` and an offset in the JSON. `QuantLinear` holds the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from fitune.errors import ConfigError
from fitune.kernels.dequantize import BLOCK_SIZE, NESTED_BLOCK_SIZE
from fitune.model.quantize import QuantLinear
from fitune.model.quantizers import absmax_table, code_table
from fitune.model.weights import WeightFiles

FORMATS = ("int8", "nf4", "fp4")
_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)$")


@dataclass(frozen=True)
class StoredWeight:
    """One quantized weight of a folder.

    Attributes:
        name: of its codes, `....weight`.
        quantization: int8, nf4 or fp4.
        shape: (N, K) of the weight it stands for.
        companions: names of the tensors that belong to it.
        facts: the JSON of a 4-bit weight.
    """

    name: str
    quantization: str
    shape: torch.Size
    companions: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)


def stored_weights(weights: WeightFiles) -> dict[str, StoredWeight]:
    """The quantized weights in files, by the name of their codes.

    Raises:
        ConfigError: a layout that `QuantLinear` does not have.
    """
    found = [*_eight_bit(weights), *_four_bit(weights)]
    return {one.name: one for one in found}


def _eight_bit(weights: WeightFiles) -> Iterator[StoredWeight]:
    for scale in weights.shapes:
        prefix, dot, last = scale.rpartition(".")
        if last != "SCB":
            continue
        name, layout = f"{prefix}{dot}weight", f"{prefix}{dot}weight_format"
        if name not in weights.shapes or len(weights.shapes[name]) != 2:
            raise ConfigError(f"{scale}: there is no matrix {name} that it could scale; the folder is incomplete")
        if layout in weights.shapes and int(weights.read(layout)) != 0:
            raise ConfigError(
                f"{name}: stored in a column layout of old versions of bitsandbytes; save the model again with "
                "bitsandbytes 0.45 or newer"
            )
        companions = (scale, layout) if layout in weights.shapes else (scale,)
        yield StoredWeight(name, "int8", weights.shapes[name], companions)


def _four_bit(weights: WeightFiles) -> Iterator[StoredWeight]:
    for state in weights.shapes:
        match = _STATE.match(state)
        if match is None:
            continue
        name, kind = match.groups()
        try:
            facts = json.loads(bytes(weights.read(state).tolist()))
            shape = torch.Size(facts["shape"])
            sizes = facts["blocksize"], facts.get("nested_blocksize", NESTED_BLOCK_SIZE)
            if kind not in ("nf4", "fp4") or len(shape) != 2 or min(shape) < 1:
                raise ValueError(f"{kind} of shape {list(shape)}")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{state}: is no description of a 4-bit weight ({error}); download it again") from error
        if sizes != (BLOCK_SIZE, NESTED_BLOCK_SIZE):
            raise ConfigError(
                f"{name}: quantized in blocks of {sizes[0]} and {sizes[1]}; fitune reads blocks of {BLOCK_SIZE} and "
                f"{NESTED_BLOCK_SIZE}, bitsandbytes' default. Give the 16-bit model with model.quantization={kind}"
            )
        companions = tuple(other for other in weights.shapes if other.startswith(f"{name}."))
        yield StoredWeight(name, kind, shape, companions, facts)


def read_stored(weights: WeightFiles, stored: StoredWeight) -> dict[str, torch.Tensor]:
    """The buffers of a `QuantLinear`, on CPU.

    Raises:
        ConfigError: tensors are missing or of another size than the weight needs.
    """
    read = _read_eight_bit if stored.quantization == "int8" else _read_four_bit
    try:
        return read(weights, stored)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{stored.name}: its tensors do not fit a {stored.quantization} weight of {list(stored.shape)} ({error}); "
            "download the folder again"
        ) from error


def _read_eight_bit(weights: WeightFiles, stored: StoredWeight) -> dict[str, torch.Tensor]:
    codes_NK, scale_N = weights.read(stored.name), weights.read(stored.companions[0]).float().view(-1)
    if codes_NK.dtype != torch.int8:
        raise ValueError(f"codes are {codes_NK.dtype}")
    _check_length("SCB", scale_N, stored.shape[0])
    return {"codes": codes_NK, "scale": scale_N}


def _read_four_bit(weights: WeightFiles, stored: StoredWeight) -> dict[str, torch.Tensor]:
    name, count = stored.name, stored.shape.numel()
    blocks = -(-count // BLOCK_SIZE)
    codes, absmax_G = weights.read(name).contiguous().view(torch.uint8).view(-1), weights.read(f"{name}.absmax")
    _check_length("codes", codes, -(-count // 2))
    _check_length("absmax", absmax_G, blocks)
    table = weights.read(f"{name}.quant_map").float()
    _check_length("quant_map", table, 16)
    buffers = {"codes": codes, "absmax": absmax_G, "table": _usual(table, code_table(stored.quantization))}
    if f"{name}.nested_absmax" not in weights.shapes:
        return buffers | {"absmax": absmax_G.float()}
    buffers["nested_absmax"] = weights.read(f"{name}.nested_absmax").float()
    _check_length("nested_absmax", buffers["nested_absmax"], -(-blocks // NESTED_BLOCK_SIZE))
    nested = weights.read(f"{name}.nested_quant_map").float()
    _check_length("nested_quant_map", nested, 256)
    offset = torch.tensor(float(stored.facts["nested_offset"]))
    return buffers | {"absmax_table": _usual(nested, absmax_table()), "offset": offset}


def _check_length(what: str, tensor: torch.Tensor, length: int) -> None:
    if tensor.numel() != length:
        raise ValueError(f"{what} has {tensor.numel()} values, needed are {length}")


def _usual(found: torch.Tensor, usual: torch.Tensor) -> torch.Tensor:
    """What a file says; the layers share the table that all files have so far."""
    return usual if torch.equal(found, usual) else found


def to_stored(layer: QuantLinear, name: str) -> dict[str, torch.Tensor]:
    """The tensors that stand for the weight of a layer called `name` in bitsandbytes' files, the bias not included.

    Raises:
        ConfigError: bitsandbytes has no such format.
    """
    weight = f"{name}.weight"
    if layer.quantization == "int8":
        layout = torch.zeros((), dtype=torch.uint8)
        return {weight: layer.codes, f"{name}.SCB": layer.scale, f"{name}.weight_format": layout}
    if layer.quantization not in FORMATS:
        raise ConfigError(f"bitsandbytes has no {layer.quantization}; allowed: {', '.join(FORMATS)}")
    facts: dict[str, Any] = {
        "quant_type": layer.quantization,
        "blocksize": BLOCK_SIZE,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    # Clones: a file cannot hold a table that several names share.
    tensors = {weight: layer.codes.view(-1, 1), f"{weight}.absmax": layer.absmax}
    tensors[f"{weight}.quant_map"] = layer.table.clone()
    if layer.offset is not None:
        facts |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
        facts["nested_offset"] = layer.offset.item()
        tensors[f"{weight}.nested_absmax"] = cast(torch.Tensor, layer.nested_absmax)
        tensors[f"{weight}.nested_quant_map"] = cast(torch.Tensor, layer.absmax_table).clone()
    text = json.dumps(facts).encode()
    tensors[f"{weight}.quant_state.bitsandbytes__{layer.quantization}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def quantization_config(model: Any, quantization: str) -> dict[str, Any]:
    """config.json's section for such files: transformers makes every other linear layer one of bitsandbytes."""
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    in_4_bits = quantization != "int8"
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": not in_4_bits,
        "load_in_4bit": in_4_bits,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": plain,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "bnb_4bit_compute_dtype": str(model.dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quantization if in_4_bits else "fp4",
        "bnb_4bit_use_double_quant": in_4_bits,
    }
